//! The service inside the container: a page, a download of any size and an echo, over HTTP/1.1, one thread a connection.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::process::die_with_parent;
use super::stream::Stream;

/// What `GET /` answers.
pub const PAGE: &str = "<!doctype html>\n<title>bro</title>\n<h1>It woke up.</h1>\n\
    <p>This page comes from a network namespace that has no way in or out: <code>bro forward</code> started its \
    service for you and relays this connection.</p>\n\
    <p><a href=\"/bulk?bytes=104857600\">100 MiB</a></p>\n";

/// How the line of an answer's head begins that tells the client its address, as the service sees it.
pub const SEEN_AS: &str = "Client-Address: ";

/// The service process. It ends when the container process ends it.
pub fn main(addresses: &[String]) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    let listen =
        |address: &String| TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"));
    let listeners: Vec<TcpListener> = addresses.iter().map(listen).collect::<Result<_>>()?;
    println!("listening");
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            listeners.into_iter().map(|listener| scope.spawn(|| accept(listener))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a listener broke")))
    })
}

fn accept(listener: TcpListener) -> Result<()> {
    for client in listener.incoming() {
        let client = client?;
        // A client that goes away is no failure of the service.
        std::thread::spawn(move || {
            let seen_as = client.peer_addr()?.to_string();
            serve(Stream::accepted(client)?, &seen_as)
        });
    }
    Ok(())
}

fn serve(mut client: Stream, seen_as: &str) -> Result<()> {
    let head = read_head(&mut client)?;
    let path = head.split(' ').nth(1).unwrap_or("/");
    match path.split_once('?').unwrap_or((path, "")) {
        ("/", _) => answer(&mut client, "200 OK", PAGE, seen_as),
        ("/bulk", query) => {
            let bytes = query.strip_prefix("bytes=").and_then(|n| n.parse().ok()).unwrap_or(0);
            bulk(&mut client, bytes)
        }
        ("/echo", _) => echo(&mut client),
        _ => answer(&mut client, "404 Not Found", "There is /, /bulk?bytes=N and /echo.\n", seen_as),
    }
}

/// Reads until the empty line that ends a request's head or an answer's head, and not one byte further.
pub fn read_head(stream: &mut Stream) -> Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < 8192, "a head of more than 8 KiB");
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn answer(client: &mut Stream, status: &str, body: &str, seen_as: &str) -> Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {length}\r\n{SEEN_AS}{seen_as}\r\n\
         Connection: close\r\n\r\n"
    );
    client.write_all((head + body).as_bytes())?;
    Ok(())
}

fn bulk(client: &mut Stream, bytes: u64) -> Result<()> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n\
         Connection: close\r\n\r\n"
    );
    client.write_all(head.as_bytes())?;
    let pattern = pattern();
    let mut left = bytes;
    while left > 0 {
        let now = left.min(pattern.len() as u64);
        client.write_all(&pattern[..now as usize])?;
        left -= now;
    }
    Ok(())
}

fn echo(client: &mut Stream) -> Result<()> {
    client.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match client.read(&mut buffer)? {
            0 => return Ok(()),
            read => client.write_all(&buffer[..read])?,
        }
    }
}

/// What a download repeats: bytes that tell their place. Its length is prime, so that no block size of a relay divides
/// it, and a block that is lost, repeated or out of order shows.
pub fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(263_167)
    .collect()
}
