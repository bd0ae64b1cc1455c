//! Counting the clients of listeners that services accept at: who counts, in which state of a connection, by which listener it came, and who has gone.
//!
//! Needs: nothing; a network namespace for two tests. Takes: seconds.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_adopt::clients::{
    ClientEnd, EndedClient, EndedClients, ServedClient, Uncountable, WithBytes, look, queued,
};
use bro_tests::adopt::Tells;
use bro_tests::netns::Namespace;
use bro_tests::peers::{Family, PATIENCE, Place as _};
use bro_tests::process::eventually;
use bro_tests::require_namespaces;
use bro_tests::scratch::Scratch;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, UnixAddr, bind, connect, listen, setsockopt,
    socket, sockopt,
};

/// How many wait at a listener, and how many are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Clients {
    queued: u32,
    served: u64,
}

fn count(listeners: &[BorrowedFd<'_>]) -> Result<Vec<Clients>> {
    let mut served = vec![0; listeners.len()];
    let queued = look(listeners, WithBytes::No, &mut |client| served[client.listener] += 1)?;
    Ok(queued.into_iter().zip(served).map(|(queued, served)| Clients { queued, served }).collect())
}

fn of(listener: impl std::os::fd::AsFd) -> Result<Clients> {
    Ok(count(&[listener.as_fd()])?[0])
}

/// Those that are served, with their bytes.
fn served(listener: &impl std::os::fd::AsFd) -> Result<Vec<ServedClient>> {
    let mut all = Vec::new();
    let _waiting = look(&[listener.as_fd()], WithBytes::Yes, &mut |client| all.push(*client))?;
    Ok(all)
}

/// As many wait, and as many are served, as soon as the kernel is that far.
fn expect(listener: impl std::os::fd::AsFd, queued: u32, served: u64) -> Result<()> {
    let expected = Clients { queued, served };
    let mut last = None;
    let came = eventually(PATIENCE, || {
        last = of(&listener).ok();
        last == Some(expected)
    });
    ensure!(came, "{last:?} instead of {expected:?}");
    Ok(())
}

#[test]
fn a_client_counts_from_the_queue_on_until_both_sides_have_said_their_last() -> Result<()> {
    for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
        let listener = TcpListener::bind(address)?;
        let port = listener.local_addr()?.port();
        let to = if address == "[::1]:0" { "::1".parse()? } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let connect = || TcpStream::connect((to, port));
        expect(&listener, 0, 0)?;
        let client = connect()?;
        expect(&listener, 1, 0)?;
        let (accepted, _) = listener.accept()?;
        expect(&listener, 0, 1)?;
        // A second one, that leaves before it is accepted, still has to be.
        drop(connect()?);
        expect(&listener, 1, 1)?;
        let (gone, _) = listener.accept()?;
        expect(&listener, 0, 2)?;
        drop(gone);
        expect(&listener, 0, 1)?;
        // The service half-closes, and hears on.
        accepted.shutdown(Shutdown::Write)?;
        expect(&listener, 0, 1)?;
        drop(client);
        expect(&listener, 0, 0)?;
        // The client half-closes, and waits for its answer.
        let client = connect()?;
        let (accepted, _) = listener.accept()?;
        client.shutdown(Shutdown::Write)?;
        expect(&listener, 0, 1)?;
        // What the service has closed the kernel still sends, and it is no longer the service's.
        setsockopt(&accepted, sockopt::SndBuf, &(4 << 20))?;
        accepted.set_nonblocking(true)?;
        while (&accepted).write(&[0; 65536]).is_ok() {}
        drop(accepted);
        expect(&listener, 0, 0)?;
        ensure!((&client).read(&mut [0; 1])? == 1, "the rest does not arrive");
    }
    Ok(())
}

#[test]
fn another_programs_connections_at_the_same_port_are_not_counted() -> Result<()> {
    // The same port before any address, at two addresses and in the other family, each another program's.
    let loopback = TcpListener::bind("127.0.0.1:0")?;
    let port = loopback.local_addr()?.port();
    let other = TcpListener::bind(("127.0.0.2", port))?;
    let sixth = TcpListener::bind(("::1", port))?;
    let pairs = [(&other, "127.0.0.2"), (&sixth, "::1")];
    let mut kept = Vec::new();
    for (listener, address) in pairs {
        kept.push((TcpStream::connect((address, port))?, listener.accept()?));
    }
    expect(&loopback, 0, 0)?;
    kept.push((TcpStream::connect(("127.0.0.1", port))?, loopback.accept()?));
    let counted = count(&[sixth.as_fd(), loopback.as_fd(), other.as_fd()])?;
    ensure!(counted == [Clients { queued: 0, served: 1 }; 3], "{counted:?}");
    // Nor is the other end of a connection, which has the port as the one that it goes to.
    let away = TcpStream::connect(("127.0.0.2", port))?;
    ensure!(of(&loopback)?.served == 1 && away.peer_addr()?.port() == port, "an outgoing one");
    Ok(())
}

#[test]
fn before_any_address_there_are_those_whom_no_other_listener_takes() -> Result<()> {
    let reused = |address: Ipv4Addr, port: u16| -> Result<TcpListener> {
        let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&made, sockopt::ReusePort, &true)?;
        bind(made.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(address, port)))?;
        listen(&made, Backlog::new(64)?)?;
        Ok(made.into())
    };
    let all = reused(Ipv4Addr::UNSPECIFIED, 0)?;
    let port = all.local_addr()?.port();
    let narrow = reused(Ipv4Addr::LOCALHOST, port)?;
    let _first = (TcpStream::connect(("127.0.0.1", port))?, narrow.accept()?);
    expect(&all, 0, 0)?;
    expect(&narrow, 0, 1)?;
    let _second = (TcpStream::connect(("127.0.0.2", port))?, all.accept()?);
    expect(&all, 0, 1)?;
    expect(&narrow, 0, 1)?;
    // Two of the same place and maker cannot be told apart: better awake than cut.
    let twin = reused(Ipv4Addr::LOCALHOST, port)?;
    expect(&twin, 0, 1)?;
    expect(&narrow, 0, 1)
}

#[test]
fn bytes_are_those_of_both_directions_and_ends_are_none() -> Result<()> {
    let listener = TcpListener::bind("[::]:0")?;
    let port = listener.local_addr()?.port();
    let mut client = TcpStream::connect(("127.0.0.1", port))?;
    let (mut accepted, _) = listener.accept()?;
    let bytes = || -> Result<Option<u64>> { Ok(served(&listener)?[0].bytes) };
    ensure!(bytes()? == Some(0), "{:?} without bytes", bytes()?);
    client.write_all(&[0; 1000])?;
    accepted.write_all(&[0; 500])?;
    ensure!(eventually(PATIENCE, || matches!(bytes(), Ok(Some(1500)))), "{:?}", bytes()?);
    // A client of an IPv6 listener that comes by IPv4 has its IPv4 address.
    ensure!(served(&listener)?[0].end == ClientEnd::Tcp(client.local_addr()?), "{:?}", served(&listener)?);
    let number = served(&listener)?[0].number;
    // Each side's end is acknowledged, and is no byte.
    client.shutdown(Shutdown::Write)?;
    accepted.set_read_timeout(Some(PATIENCE))?;
    let mut rest = Vec::new();
    accepted.read_to_end(&mut rest)?;
    ensure!(bytes()? == Some(1500), "{:?} with the client's end", bytes()?);
    drop((client, accepted));
    ensure!(eventually(PATIENCE, || served(&listener).is_ok_and(|all| all.is_empty())), "it stays");
    // The service's alone.
    let client = TcpStream::connect(("::1", port))?;
    let (accepted, _) = listener.accept()?;
    accepted.shutdown(Shutdown::Write)?;
    ensure!((&client).read(&mut [0])? == 0, "no end");
    ensure!(bytes()? == Some(0) && served(&listener)?[0].number != number, "{:?}", served(&listener)?);
    let mut none = Vec::new();
    let _waiting = look(&[listener.as_fd()], WithBytes::No, &mut |client| none.push(client.bytes))?;
    ensure!(none == [None], "not asked for: {none:?}");
    Ok(())
}

#[test]
fn a_thousand_clients_are_counted_in_time() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut kept = Vec::new();
    for _ in 0..1000 {
        kept.push((TcpStream::connect(address)?, listener.accept()?));
    }
    let started = Instant::now();
    let clients = served(&listener)?;
    let whole = started.elapsed();
    ensure!(clients.len() == 1000, "{}", clients.len());
    println!("1000 clients with their bytes in {whole:?}");
    // Milliseconds, even of an unoptimised program; a busy machine takes longer.
    ensure!(whole < Duration::from_secs(2), "{whole:?}");
    Ok(())
}

#[test]
fn clients_of_unix_sockets_are_told_by_the_file_and_by_the_name() -> Result<()> {
    let folder = Scratch::new()?;
    let path = folder.join("service");
    let (first, name) = (UnixListener::bind(&path)?, format!("bro-adopt-clients-{}", std::process::id()));
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
    let named = UnixListener::bind_addr(&address)?;
    expect(&first, 0, 0)?;
    let client = UnixStream::connect(&path)?;
    expect(&first, 1, 0)?;
    let accepted = first.accept()?;
    expect(&first, 0, 1)?;
    // Another one at the same path is another one.
    std::fs::remove_file(&path)?;
    let second = UnixListener::bind(&path)?;
    expect(&second, 0, 0)?;
    let _other = (UnixStream::connect(&path)?, second.accept()?);
    let _named = (UnixStream::connect_addr(&address)?, named.accept()?);
    let counted = count(&[first.as_fd(), named.as_fd(), second.as_fd()])?;
    ensure!(counted.iter().all(|clients| clients.served == 1), "{counted:?}");
    let all = served(&first)?;
    ensure!(
        all.iter().all(|client| client.bytes.is_none() && matches!(client.end, ClientEnd::Unix(1..))),
        "{all:?}"
    );
    // It is gone when the service closes it.
    drop(client);
    expect(&first, 0, 1)?;
    drop(accepted);
    expect(&first, 0, 0)
}

#[test]
fn a_unix_client_of_another_namespace_is_seen_only_while_it_waits() -> Result<()> {
    require_namespaces!();
    let (folder, elsewhere) = (Scratch::new()?, Namespace::new()?);
    let path = folder.join("service");
    let listener = UnixListener::bind(&path)?;
    let client = elsewhere.socket(Family::Unix)?;
    connect(client.as_raw_fd(), &UnixAddr::new(&path)?)?;
    ensure!(queued(listener.as_fd())? == 1, "it waits");
    let _served = listener.accept()?;
    // As the manual says: the kernel has it in the other namespace's table.
    ensure!(of(&listener)? == Clients::default(), "{:?}", of(&listener)?);
    Ok(())
}

#[test]
fn nothing_is_said_of_another_namespaces_listener() -> Result<()> {
    require_namespaces!();
    let elsewhere = Namespace::new()?;
    let made = elsewhere.socket(Family::Tcp4)?;
    bind(made.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    listen(&made, Backlog::new(8)?)?;
    let client = elsewhere.socket(Family::Tcp4)?;
    let listener = TcpListener::from(made);
    let SocketAddr::V4(address) = listener.local_addr()? else { anyhow::bail!("no IPv4 listener") };
    let refused =
        matches!(look(&[listener.as_fd()], WithBytes::No, &mut |_| ()), Err(Uncountable::Elsewhere));
    ensure!(refused == Tells::Namespace.here()?, "refused: {refused}");
    // But for who waits, whom the listener itself tells of.
    match connect(client.as_raw_fd(), &SockaddrIn::from(address)) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    ensure!(eventually(PATIENCE, || matches!(queued(listener.as_fd()), Ok(1))), "it waits");
    Ok(())
}

/// Comes, is accepted and goes.
fn visit(listener: &TcpListener, to: IpAddr) -> Result<()> {
    let client = TcpStream::connect((to, listener.local_addr()?.port()))?;
    let served = listener.accept()?;
    drop(client);
    drop(served);
    Ok(())
}

fn is_heard_of(ended: &EndedClients, listener: &TcpListener) -> Result<bool> {
    Ok(ended.any(&[listener.as_fd()], &mut |_| true)?)
}

fn is_told(ended: &EndedClients, listener: &TcpListener) -> Result<()> {
    let told = || is_heard_of(ended, listener).unwrap_or(false);
    ensure!(eventually(PATIENCE, told), "a client of {:?} was not told of", listener.local_addr()?);
    Ok(())
}

#[test]
fn a_client_that_came_and_went_is_told_of_once_and_one_that_is_there_is_not() -> Result<()> {
    let (fourth, sixth) = (IpAddr::V4(Ipv4Addr::LOCALHOST), "::1".parse()?);
    for (address, to) in [
        ("127.0.0.1:0", fourth),
        ("0.0.0.0:0", fourth),
        ("[::1]:0", sixth),
        ("[::]:0", sixth),
        ("[::]:0", fourth),
    ] {
        let listener = TcpListener::bind(address)?;
        let ended = EndedClients::of(&[listener.as_fd()])?.context("a TCP listener")?;
        let stays = (TcpStream::connect((to, listener.local_addr()?.port()))?, listener.accept()?);
        ensure!(!is_heard_of(&ended, &listener)?, "{address}: one that is there");
        visit(&listener, to)?;
        is_told(&ended, &listener)?;
        ensure!(!is_heard_of(&ended, &listener)?, "{address}: twice");
        drop(stays);
        is_told(&ended, &listener)?;
        // Nor does a reset by the service hide one.
        let client = TcpStream::connect((to, listener.local_addr()?.port()))?;
        let (served, _) = listener.accept()?;
        setsockopt(&served, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        drop(served);
        is_told(&ended, &listener)?;
        drop(client);
    }
    Ok(())
}

#[test]
fn what_a_client_had_sent_is_told_when_it_has_gone() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ended = EndedClients::of(&[listener.as_fd()])?.context("a TCP listener")?;
    for sent in [0, 7] {
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut accepted, _) = listener.accept()?;
        let number = served(&listener)?[0].number;
        client.write_all(&vec![0; sent])?;
        accepted.read_exact(&mut vec![0; sent])?;
        let end = ClientEnd::Tcp(client.local_addr()?);
        drop((client, accepted));
        let mut told: Vec<EndedClient> = Vec::new();
        let came = eventually(PATIENCE, || {
            ended
                .any(&[listener.as_fd()], &mut |gone| {
                    told.push(*gone);
                    true
                })
                .unwrap_or(false)
        });
        let [gone] = told[..] else { anyhow::bail!("{told:?}") };
        let bytes = gone.bytes.context("the kernel tells bytes")?;
        ensure!(came && gone.number == number && gone.end == end, "{gone:?}");
        ensure!((sent as u64..=sent as u64 + 2).contains(&bytes), "{bytes} of {sent}");
    }
    // Such a one does not count where it is not to.
    visit(&listener, Ipv4Addr::LOCALHOST.into())?;
    let mut asked = false;
    let deaf = || {
        let counted = ended.any(&[listener.as_fd()], &mut |_| {
            asked = true;
            false
        });
        asked || counted.unwrap_or(true)
    };
    ensure!(eventually(PATIENCE, deaf) && asked, "it was not told of");
    Ok(())
}

#[test]
fn clients_of_other_listeners_are_not_told_of_however_many() -> Result<()> {
    // Another port, the same port at another address and in the other family; a more exact listener takes them from one at any address.
    let any_address = TcpListener::bind("0.0.0.0:0")?;
    let port = any_address.local_addr()?.port();
    let own = TcpListener::bind("127.0.0.1:0")?;
    let own_port = own.local_addr()?.port();
    let elsewhere: [(TcpListener, IpAddr); 4] = [
        (any_address, Ipv4Addr::LOCALHOST.into()),
        (TcpListener::bind(("127.0.0.2", own_port))?, "127.0.0.2".parse()?),
        (TcpListener::bind(("::1", own_port))?, "::1".parse()?),
        (TcpListener::bind(("::1", port))?, "::1".parse()?),
    ];
    let ended = EndedClients::of(&[own.as_fd()])?.context("a TCP listener")?;
    // More than the buffer holds.
    for _ in 0..200 {
        for (listener, to) in &elsewhere {
            visit(listener, *to)?;
        }
    }
    // The kernel tells about in order, so that nearly all of those were told of before this one.
    let all = EndedClients::of(&[elsewhere[0].0.as_fd()])?.context("a TCP listener")?;
    visit(&elsewhere[0].0, Ipv4Addr::LOCALHOST.into())?;
    is_told(&all, &elsewhere[0].0)?;
    ensure!(!is_heard_of(&ended, &own)?, "clients of others were told of");
    visit(&own, Ipv4Addr::LOCALHOST.into())?;
    is_told(&ended, &own)
}

#[test]
fn a_client_that_a_more_exact_listener_took_is_not_one_of_any_address() -> Result<()> {
    let reused = |address: Ipv4Addr, port: u16| -> Result<TcpListener> {
        let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&made, sockopt::ReusePort, &true)?;
        bind(made.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(address, port)))?;
        listen(&made, Backlog::new(64)?)?;
        Ok(made.into())
    };
    let all = reused(Ipv4Addr::UNSPECIFIED, 0)?;
    let narrow = reused(Ipv4Addr::LOCALHOST, all.local_addr()?.port())?;
    let of_all = EndedClients::of(&[all.as_fd()])?.context("a TCP listener")?;
    let of_narrow = EndedClients::of(&[narrow.as_fd()])?.context("a TCP listener")?;
    visit(&narrow, Ipv4Addr::LOCALHOST.into())?;
    is_told(&of_narrow, &narrow)?;
    ensure!(!is_heard_of(&of_all, &all)?, "it was the other's");
    let client = TcpStream::connect(("127.0.0.2", all.local_addr()?.port()))?;
    drop((client, all.accept()?));
    is_told(&of_all, &all)?;
    ensure!(!is_heard_of(&of_narrow, &narrow)?, "it was the other's");
    Ok(())
}

#[test]
fn more_clients_than_the_buffer_holds_are_clients_all_the_same() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ended = EndedClients::of(&[listener.as_fd()])?.context("a TCP listener")?;
    for _ in 0..1000 {
        visit(&listener, Ipv4Addr::LOCALHOST.into())?;
    }
    is_told(&ended, &listener)?;
    // It goes on hearing after some were lost, and is not busy for ever.
    ensure!(eventually(PATIENCE, || matches!(is_heard_of(&ended, &listener), Ok(false))), "without end");
    visit(&listener, Ipv4Addr::LOCALHOST.into())?;
    is_told(&ended, &listener)
}

#[test]
fn unix_listeners_alone_are_not_heard_of() -> Result<()> {
    let folder = Scratch::new()?;
    let listener = UnixListener::bind(folder.join("service"))?;
    ensure!(EndedClients::of(&[listener.as_fd()])?.is_none(), "the kernel tells of no unix socket");
    Ok(())
}
