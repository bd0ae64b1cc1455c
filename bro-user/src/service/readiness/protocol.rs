//! What a service says of itself in its own protocol: whether it takes clients, or is only about to.

use std::fmt;

/// A protocol in which a service can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// The answer to a GET is below 500.
    Http(HttpPage),
    /// Anything but SQLSTATE 57P03 (`cannot_connect_now`), as in pg_isready(1).
    Postgres,
    /// The server's greeting, which comes first.
    Mysql,
    /// Anything but `-LOADING` to a PING.
    Redis,
}

/// What to GET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpPage {
    /// Named in the request (`Host:`); bro does not connect to it.
    host: Option<String>,
    /// Instead of the target's.
    pub port: Option<u16>,
    path: String,
}

/// What an answer, as far as it has come, means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadinessAnswer {
    /// The service takes clients.
    Ready,
    /// It speaks the protocol, and says that it is not ready.
    NotYet,
    /// It speaks another protocol.
    Foreign,
}

/// Only so many bytes of an answer are looked at.
pub const MOST: usize = 4096;

impl Protocol {
    /// The protocol that is usual at a port, if that says when the service is ready.
    #[must_use]
    pub const fn at(port: u16) -> Option<Self> {
        match port {
            5432 => Some(Self::Postgres),
            3306 => Some(Self::Mysql),
            6379 => Some(Self::Redis),
            _ => None,
        }
    }

    /// What the client says first.
    #[must_use]
    pub fn question(&self) -> Vec<u8> {
        match self {
            Self::Http(page) => {
                let host = page.host.as_deref().unwrap_or("localhost");
                let path = &page.path;
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bro\r\nConnection: close\r\n\r\n")
                    .into()
            }
            // The greeting is awaited.
            Self::Mysql => Vec::new(),
            Self::Postgres => {
                let mut message = 196_608_u32.to_be_bytes().to_vec();
                message.extend(b"user\0postgres\0database\0postgres\0application_name\0bro\0\0");
                let length = u32::try_from(message.len() + 4).unwrap_or(0);
                [length.to_be_bytes().as_slice(), &message].concat()
            }
            Self::Redis => b"PING\r\n".to_vec(),
        }
    }

    /// What the answer means, of which this has come; nothing while that cannot be told.
    #[must_use]
    pub fn understand(&self, answer: &[u8]) -> Option<ReadinessAnswer> {
        match self {
            Self::Http(_) => http(answer),
            Self::Postgres => postgres(answer),
            Self::Mysql => mysql(answer),
            Self::Redis => redis(answer),
        }
    }

    /// The protocol's usual name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Http(_) => "HTTP",
            Self::Postgres => "PostgreSQL",
            Self::Mysql => "MySQL",
            Self::Redis => "Redis",
        }
    }
}

impl HttpPage {
    /// `[//HOST][:PORT]/PATH`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return None;
        }
        let slash = match text.strip_prefix("//") {
            Some(rest) => rest.find('/')? + 2,
            None => text.find('/')?,
        };
        let (place, path) = text.split_at(slash);
        // An IPv6 address has colons of its own, in brackets.
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, Some(port.parse().ok().filter(|p| *p != 0)?))
            }
            _ => (place, None),
        };
        let host = match host {
            "" => None,
            host => Some(host.strip_prefix("//").filter(|host| !host.is_empty())?.to_owned()),
        };
        Some(Self { host, port, path: path.to_owned() })
    }
}

impl fmt::Display for HttpPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, "//{host}")?;
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        f.write_str(&self.path)
    }
}

/// Ready, or foreign once it cannot become `prefix` any more.
fn begins(answer: &[u8], prefix: &[u8]) -> Option<bool> {
    let common = answer.len().min(prefix.len());
    if answer[..common] != prefix[..common] {
        return Some(false);
    }
    (common == prefix.len()).then_some(true)
}

/// `HTTP/1.1 503 …`
fn http(answer: &[u8]) -> Option<ReadinessAnswer> {
    if !begins(answer, b"HTTP/1.")? {
        return Some(ReadinessAnswer::Foreign);
    }
    let status = answer.get(9..12)?;
    Some(match status.iter().all(u8::is_ascii_digit) {
        false => ReadinessAnswer::Foreign,
        true if status[0] >= b'5' => ReadinessAnswer::NotYet,
        true => ReadinessAnswer::Ready,
    })
}

/// A message of the backend's: its kind, its length without that, and for an error fields that begin with a letter and end with 0.
fn postgres(answer: &[u8]) -> Option<ReadinessAnswer> {
    match answer.first()? {
        // A request to authenticate, or a word on versions before that.
        b'R' | b'v' => Some(ReadinessAnswer::Ready),
        b'E' => {
            let length = u32::from_be_bytes(*answer.get(1..)?.first_chunk()?) as usize;
            if !(5..MOST).contains(&length) {
                return Some(ReadinessAnswer::Foreign);
            }
            let fields = answer.get(5..=length)?.split(|byte| *byte == 0);
            let mut codes = fields.filter_map(|field| field.strip_prefix(b"C"));
            Some(if codes.any(|code| code == b"57P03") {
                ReadinessAnswer::NotYet
            } else {
                ReadinessAnswer::Ready
            })
        }
        _ => Some(ReadinessAnswer::Foreign),
    }
}

/// A packet: three bytes of length, the number 0, and version 10 of the protocol or an error (too many clients, say).
fn mysql(answer: &[u8]) -> Option<ReadinessAnswer> {
    let [_, _, high, number, first] = *answer.first_chunk()?;
    // No greeting has 64 KiB.
    let is_greeting = high == 0 && number == 0 && matches!(first, 10 | 0xff);
    Some(if is_greeting { ReadinessAnswer::Ready } else { ReadinessAnswer::Foreign })
}

/// One line, which need not have come to its end.
fn redis(answer: &[u8]) -> Option<ReadinessAnswer> {
    match answer.first()? {
        b'+' => {
            Some(if begins(answer, b"+PONG")? { ReadinessAnswer::Ready } else { ReadinessAnswer::Foreign })
        }
        b'-' => {
            Some(if begins(answer, b"-LOADING")? { ReadinessAnswer::NotYet } else { ReadinessAnswer::Ready })
        }
        _ => Some(ReadinessAnswer::Foreign),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(code: &str) -> Vec<u8> {
        let fields = format!("SFATAL\0VFATAL\0C{code}\0MC57P03 is only in the text\0\0");
        let length = u32::try_from(fields.len() + 4).unwrap();
        [b"E".as_slice(), &length.to_be_bytes(), fields.as_bytes()].concat()
    }

    fn cases() -> Vec<(Protocol, Vec<u8>, ReadinessAnswer)> {
        let http = || Protocol::Http(HttpPage::parse("/").unwrap());
        let said = |text: &str| text.as_bytes().to_vec();
        vec![
            (http(), said("HTTP/1.1 204 No Content\r\n"), ReadinessAnswer::Ready),
            (http(), said("HTTP/1.0 404 Not Found\r\n"), ReadinessAnswer::Ready),
            (http(), said("HTTP/1.1 503 Service Unavailable\r\n"), ReadinessAnswer::NotYet),
            (http(), said("HTTP/1.1 5x3 "), ReadinessAnswer::Foreign),
            (http(), said("SSH-2.0-OpenSSH"), ReadinessAnswer::Foreign),
            (Protocol::Postgres, vec![b'R', 0, 0, 0, 8, 0, 0, 0, 0], ReadinessAnswer::Ready),
            (Protocol::Postgres, error("57P03"), ReadinessAnswer::NotYet),
            (Protocol::Postgres, error("28P01"), ReadinessAnswer::Ready),
            (Protocol::Postgres, error("53300"), ReadinessAnswer::Ready),
            (
                Protocol::Postgres,
                said("EFATAL:  the database system is starting up\n\0"),
                ReadinessAnswer::Foreign,
            ),
            (Protocol::Postgres, said("HTTP/1.1 400"), ReadinessAnswer::Foreign),
            (Protocol::Mysql, [&[74, 0, 0, 0, 10][..], b"8.4.0\0"].concat(), ReadinessAnswer::Ready),
            (
                Protocol::Mysql,
                [&[23, 0, 0, 0, 0xff, 16, 4][..], b"Too many connections"].concat(),
                ReadinessAnswer::Ready,
            ),
            (Protocol::Mysql, said("220 mail.example.org"), ReadinessAnswer::Foreign),
            (Protocol::Redis, said("+PONG\r\n"), ReadinessAnswer::Ready),
            (Protocol::Redis, said("-NOAUTH Authentication required.\r\n"), ReadinessAnswer::Ready),
            (
                Protocol::Redis,
                said("-LOADING Redis is loading the dataset in memory\r\n"),
                ReadinessAnswer::NotYet,
            ),
            (Protocol::Redis, said("ERROR\r\n"), ReadinessAnswer::Foreign),
            (Protocol::Redis, said("+OK\r\n"), ReadinessAnswer::Foreign),
        ]
    }

    #[test]
    fn answers_are_understood() {
        for (protocol, answer, meaning) in cases() {
            assert_eq!(protocol.understand(&answer), Some(meaning), "{}", answer.escape_ascii());
        }
    }

    #[test]
    fn a_part_of_an_answer_never_means_something_else() {
        for (protocol, answer, meaning) in cases() {
            for length in 0..answer.len() {
                let so_far = protocol.understand(&answer[..length]);
                assert!([None, Some(meaning)].contains(&so_far), "{}: {so_far:?}", answer.escape_ascii());
            }
        }
    }

    #[test]
    fn pages_are_read_as_they_are_written() {
        for text in ["/", "/health?deep=1", ":8081/health", "//example.org/a", "//[::1]:81/a", "//[::1]/a"] {
            assert_eq!(HttpPage::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "health", ":0/a", ":x/a", "://a", "//", "//a", "///a", "/a b", "/a\r\nX: y", "a:1/b"]
        {
            assert_eq!(HttpPage::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_question_to_postgresql_has_the_length_that_it_says() {
        let question = Protocol::Postgres.question();
        assert_eq!(u32::from_be_bytes(*question.first_chunk().unwrap()) as usize, question.len());
    }

    proptest! {
        #[test]
        fn no_answer_is_too_strange(answer in prop::collection::vec(any::<u8>(), 0..64)) {
            for (protocol, ..) in cases() {
                let _understood = protocol.understand(&answer);
            }
        }

        #[test]
        fn no_page_is_too_strange(text in "[/:a\\[\\]0-9 ]{0,12}") {
            if let Some(page) = HttpPage::parse(&text) {
                prop_assert_eq!(page.to_string(), text);
            }
        }
    }
}
