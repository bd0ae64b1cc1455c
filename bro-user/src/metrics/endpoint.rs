//! Where a forwarder with `--metrics` listens: an address of TCP, or a unix socket.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// The unix socket's users: the forwarder's own, and the group of its folder or user.
const MODE: u32 = 0o660;

/// `--metrics`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over a unix socket.
    Unix(PathBuf),
}

/// Why a text is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum InvalidEndpoint {
    /// It is neither.
    #[error(
        "“{0}” is neither ADDR:PORT, such as 127.0.0.1:9464, nor a PORT, nor a path that begins with a slash"
    )]
    Neither(String),
    /// It is too long.
    #[error("the path of a unix socket may have 107 bytes: “{0}” has more")]
    TooLong(String),
    /// It is more than one line.
    #[error("a path with a line feed in it cannot stand in a unit")]
    Lines,
}

impl std::str::FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        if text.starts_with('/') {
            return match text {
                _ if text.contains(char::is_control) => Err(InvalidEndpoint::Lines),
                _ if text.len() > 107 => Err(InvalidEndpoint::TooLong(text.to_owned())),
                _ => Ok(Self::Unix(text.into())),
            };
        }
        // Not on every address: what a service does is not shown on the network unless the administrator asks for that.
        let port = text.parse::<u16>().map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        let address = port.or_else(|_| text.parse());
        address.map(Self::Tcp).map_err(|_| InvalidEndpoint::Neither(text.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A listening socket there.
#[derive(Debug)]
pub(super) enum ListeningEndpoint {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf, inode: (u64, u64) },
}

/// A connection that came in.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl ListeningEndpoint {
    pub fn at(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(address) => {
                // With SO_REUSEADDR, so that a restart need not wait for connections that have ended.
                let socket = std::net::TcpListener::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok(Self::Tcp(TcpListener::from_std(socket)?))
            }
            Endpoint::Unix(path) => {
                clear(path)?;
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))?;
                Ok(Self::Unix { listener, path: path.clone(), inode: inode(path)? })
            }
        }
    }

    /// Where it is, with the port that the kernel gave.
    pub fn place(&self) -> String {
        match self {
            Self::Tcp(listener) => {
                listener.local_addr().map_or_else(|_| String::new(), |at| format!("http://{at}/metrics"))
            }
            Self::Unix { path, .. } => format!("{}, as http://localhost/metrics", path.display()),
        }
    }

    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => Ok(Stream::Tcp(listener.accept().await?.0)),
            Self::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl Drop for ListeningEndpoint {
    fn drop(&mut self) {
        if let Self::Unix { path, inode: own, .. } = self
            && inode(path).is_ok_and(|there| there == *own)
        {
            std::fs::remove_file(path).ok();
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket without a listener, and nothing else.
fn clear(path: &Path) -> io::Result<()> {
    let there = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there?,
    };
    if !there.file_type().is_socket() {
        return Err(io::Error::other("something that is no socket is there"));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Ok(_) => Err(nix::errno::Errno::EADDRINUSE.into()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_ports_and_paths_and_refuses_the_rest_with_the_reason() {
        let said = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.to_string());
        assert_eq!(said("9464").unwrap(), "127.0.0.1:9464");
        for text in ["127.0.0.1:9464", "[::1]:9464", "0.0.0.0:0", "/run/bro/metrics.sock"] {
            assert_eq!(said(text).unwrap(), text);
        }
        for text in ["", "localhost:9464", "127.0.0.1", "::1", "70000", "run/x", "@abstract", "1:2:3"] {
            let why = said(text).unwrap_err().to_string();
            assert!(why.contains(text) && why.contains("ADDR:PORT"), "{why}");
        }
        assert!(matches!(said(&format!("/{}", "x".repeat(107))), Err(InvalidEndpoint::TooLong(_))));
        assert!(matches!(said("/run/a\nb"), Err(InvalidEndpoint::Lines)));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-endpoint-XXXXXX")).unwrap();
        let path = folder.join("s");
        let endpoint = Endpoint::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listening = ListeningEndpoint::at(&endpoint).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        let why = ListeningEndpoint::at(&endpoint).unwrap_err();
        assert_eq!(why.kind(), io::ErrorKind::AddrInUse);
        drop(listening);
        assert!(!path.exists(), "the socket is left behind");
        // A socket that is another process's by now stays.
        let listening = ListeningEndpoint::at(&endpoint).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(listening);
        assert!(path.exists(), "another's socket is gone");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        assert!(ListeningEndpoint::at(&endpoint).unwrap_err().to_string().contains("no socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
