//! The answer to `GET /metrics`, and to nothing else: one request a connection, bounded in length, time and number.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::endpoint::{Endpoint, ListeningEndpoint, Stream};

/// So many are answered at a time; the next wait in the socket's backlog.
const AT_ONCE: usize = 8;

/// The longest request, with all of its headers.
const LONGEST: usize = 8 * 1024;

/// The most headers of one.
const HEADERS: usize = 64;

/// How long a request may take to come, an answer to be made, and an answer to be taken; each.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// How long, and how much, is read of what still comes after the answer: closing earlier would take the answer away.
const LINGER: (Duration, usize) = (Duration::from_secs(1), 64 * 1024);

/// How soon it is tried again when the kernel has no descriptor for a connection.
const PAUSE: Duration = Duration::from_secs(1);

/// The form of the answer.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A client wants the text.
pub(crate) type Question = oneshot::Sender<String>;

/// A listening endpoint.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    listening: ListeningEndpoint,
    places: Arc<Semaphore>,
    questions: (UnboundedSender<Question>, UnboundedReceiver<Question>),
}

impl MetricsServer {
    /// Listens there from now on.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn start(endpoint: &Endpoint) -> anyhow::Result<Self> {
        let listening = ListeningEndpoint::at(endpoint).with_context(|| {
            format!("--metrics: cannot listen at {endpoint}; give another address, or leave it out")
        })?;
        tracing::info!("metrics are at {}", listening.place());
        Ok(Self { listening, places: Arc::new(Semaphore::new(AT_ONCE)), questions: unbounded_channel() })
    }

    /// Waits for a client that wants the text. Nothing is lost when this is cancelled.
    pub async fn asked(&mut self) -> Question {
        loop {
            let (listening, places) = (&self.listening, self.places.clone());
            let next = async move {
                let place = places.acquire_owned().await.map_err(io::Error::other)?;
                match listening.accept().await {
                    Ok(stream) => Ok((stream, place)),
                    Err(error) => {
                        tracing::debug!(%error, "a request for metrics cannot be taken; trying again");
                        sleep(PAUSE).await;
                        Err(error)
                    }
                }
            };
            tokio::select! {
                Some(question) = self.questions.1.recv() => return question,
                next = next => if let Ok((stream, place)) = next {
                    let to = self.questions.0.clone();
                    drop(match stream {
                        Stream::Tcp(stream) => tokio::spawn(serve(stream, place, to)),
                        Stream::Unix(stream) => tokio::spawn(serve(stream, place, to)),
                    });
                },
            }
        }
    }
}

/// What came instead of a request for the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Malformed,
    TooLong,
    TooSlow,
    OtherMethod,
    OtherPage,
    NoAnswer,
}

impl Refusal {
    /// The status line's part, and a sentence.
    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Malformed => ("400 Bad Request", "That is no HTTP request."),
            Self::TooLong => ("431 Request Header Fields Too Large", "The request is too long."),
            Self::TooSlow => ("408 Request Timeout", "The request took too long."),
            Self::OtherMethod => ("405 Method Not Allowed", "There is only GET here."),
            Self::OtherPage => ("404 Not Found", "There is only /metrics here."),
            Self::NoAnswer => ("503 Service Unavailable", "The forwarder does not answer."),
        }
    }
}

/// What the beginning of a request says; `None` while there is more to come.
fn judge(head: &[u8]) -> Option<Result<(), Refusal>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) if head.len() >= LONGEST => Some(Err(Refusal::TooLong)),
        Ok(httparse::Status::Partial) => None,
        Err(httparse::Error::TooManyHeaders) => Some(Err(Refusal::TooLong)),
        Err(_) => Some(Err(Refusal::Malformed)),
        Ok(httparse::Status::Complete(_)) => {
            let page = request.path.unwrap_or_default();
            let page = page.split_once('?').map_or(page, |(page, _)| page);
            Some(match (request.method, page) {
                (Some("GET"), "/metrics") => Ok(()),
                (_, "/metrics") => Err(Refusal::OtherMethod),
                _ => Err(Refusal::OtherPage),
            })
        }
    }
}

/// Reads a request, to its end or until it is clear that it is none. `None` when the client says no more.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Result<(), Refusal>> {
    let mut head = Vec::with_capacity(1024);
    loop {
        let mut some = [0; 1024];
        let room = some.len().min(LONGEST - head.len());
        match stream.read(&mut some[..room]).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => head.extend_from_slice(&some[..count]),
        }
        if let Some(judged) = judge(&head) {
            return Some(judged);
        }
    }
}

fn answer(status: &str, kind: &str, more: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n{body}"
    )
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    place: OwnedSemaphorePermit,
    to: UnboundedSender<Question>,
) {
    let said = match timeout(REQUEST_LIMIT, read(&mut stream)).await {
        Ok(Some(said)) => said,
        Ok(None) => return,
        Err(_) => Err(Refusal::TooSlow),
    };
    let text = match said {
        Ok(()) => ask(&to).await,
        Err(refusal) => Err(refusal),
    };
    let answer = match text {
        Ok(text) => answer("200 OK", OPENMETRICS, "", &text),
        Err(refusal) => {
            let (status, sentence) = refusal.words();
            let allow = if refusal == Refusal::OtherMethod { "Allow: GET\r\n" } else { "" };
            answer(status, "text/plain; charset=utf-8", allow, &format!("{sentence}\n"))
        }
    };
    let writing = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    if matches!(timeout(REQUEST_LIMIT, writing).await, Ok(Ok(()))) {
        drop(
            timeout(LINGER.0, tokio::io::copy(&mut stream.take(LINGER.1 as u64), &mut tokio::io::sink()))
                .await,
        );
    }
    drop(place);
}

async fn ask(to: &UnboundedSender<Question>) -> Result<String, Refusal> {
    let (question, text) = oneshot::channel();
    // The forwarder may have ended meanwhile.
    to.send(question).map_err(|_| Refusal::NoAnswer)?;
    match timeout(REQUEST_LIMIT, text).await {
        Ok(Ok(text)) => Ok(text),
        _ => Err(Refusal::NoAnswer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_get_metrics_is_answered() {
        let judged = |text: &str| judge(text.as_bytes());
        assert_eq!(judged("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Some(Ok(())));
        assert_eq!(judged("GET /metrics?name=x HTTP/1.0\r\n\r\n"), Some(Ok(())));
        assert_eq!(judged("GET / HTTP/1.1\r\n\r\n"), Some(Err(Refusal::OtherPage)));
        assert_eq!(judged("GET /metrics/ HTTP/1.1\r\n\r\n"), Some(Err(Refusal::OtherPage)));
        assert_eq!(judged("POST /metrics HTTP/1.1\r\n\r\nx"), Some(Err(Refusal::OtherMethod)));
        assert_eq!(judged("HEAD /metrics HTTP/1.1\r\n\r\n"), Some(Err(Refusal::OtherMethod)));
        assert_eq!(judged("GET /metr"), None);
        assert_eq!(judged("GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
        assert_eq!(judged("\u{16}\u{3}\u{1}"), Some(Err(Refusal::Malformed)), "TLS");
        let long = format!("GET /{} HTTP/1.1", "x".repeat(LONGEST));
        assert_eq!(judged(&long), Some(Err(Refusal::TooLong)));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(judged(&many), Some(Err(Refusal::TooLong)));
    }
}
