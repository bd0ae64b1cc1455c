//! Adoption of sockets for datagrams: a service under the filter has the host's socket from its bind(2) on. The harness plays the OCI runtime and the
//! service manager's store, as in the suite `adopt`.
//!
//! Needs: a network namespace; dnsmasq for one test. Takes: seconds.

use std::io::Write as _;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{Adoption, Program, Tells, datagrams, expect_answered, says_hello};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::tier::{Need, find_program, met};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where services have their datagrams from, each in a namespace of its own.
const INSIDE: &str = "127.0.0.1:5353";

const ADOPTED: &str = "Adopted { listener: 0, options_refused: 0, inside: None }";

fn v4() -> Result<(UdpSocket, Adoption)> {
    let (host, passed) = datagrams("127.0.0.1:0")?;
    Ok((host, Adoption::new(vec![(passed, INSIDE.into())])?))
}

/// A client inside the container reaches the service, and hears from where it has written to.
fn expect_answered_inside(adoption: &Adoption, container: &Program) -> Result<()> {
    let program = bro_tests::bro::adopt();
    let asks = adoption.executed(container, &[program.to_str().context("text")?, "hello", INSIDE])?;
    let said = asks.says("told")?;
    ensure!(said.starts_with("told 127.0.0.1:") && said.ends_with(&format!(" by {INSIDE}")), "{said}");
    ensure!(asks.wait()?.success(), "a client inside");
    Ok(())
}

fn end(container: Program, agent: &Program) -> Result<()> {
    container.end()?;
    agent.says("Ended { listener: 0 }")?;
    Ok(())
}

#[test]
fn a_service_has_the_hosts_socket_and_the_datagram_that_came_before_it() -> Result<()> {
    require_namespaces!();
    for (outside, target, place) in [
        ("127.0.0.1:0", INSIDE, "0.0.0.0:5353"),
        ("127.0.0.1:0", INSIDE, INSIDE),
        ("[::]:0", "[::1]:5353", "[::]:5353"),
        // IPv6-only from a dual one, and from one that an address has made so.
        ("[::]:0", "[::1]:5353", "only[::]:5353"),
        ("[::1]:0", "[::1]:5353", "only[::]:5353"),
        ("[::1]:0", "[::1]:5353", "[::1]:5353"),
    ] {
        let (host, passed) = datagrams(outside)?;
        let adoption = Adoption::new(vec![(passed, target.into())])?;
        let agent = adoption.agent(None)?;
        let early = says_hello(&host)?;
        let service = adoption.service(&["datagrams", place])?;
        let flags = service.says("ready").with_context(|| place.to_owned())?;
        // Closed on exec and blocking, as the service made its own.
        ensure!(flags.ends_with("02000002"), "{place}: {flags}");
        agent.says(ADOPTED)?;
        expect_answered(&early).with_context(|| place.to_owned())?;
        expect_answered(&says_hello(&host)?)?;
        if target == INSIDE {
            expect_answered_inside(&adoption, &service)?;
        }
        end(service, &agent)?;
        ensure!(adoption.stored() == ["adopt-record"], "{:?} stays in the store", adoption.stored());
    }
    Ok(())
}

#[test]
fn a_service_of_another_family_or_elsewhere_keeps_its_own_socket() -> Result<()> {
    require_namespaces!();
    let (v6, passed) = datagrams("[::1]:0")?;
    let adoption = Adoption::new(vec![(passed, INSIDE.into())])?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["datagrams", "0.0.0.0:5353"])?;
    agent.says("NotAdopted { listener: 0, why: Family }")?;
    service.says("ready")?;
    expect_answered_inside(&adoption, &service)?;
    drop((v6, agent));

    let (_host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let dual = adoption.service(&["datagrams", "[::]:5353"])?;
    agent.says("NotAdopted { listener: 0, why: Family }")?;
    dual.says("ready")?;
    let other = adoption.service(&["datagrams", "0.0.0.0:5354"])?;
    other.says("ready")?;
    // Nor does a command that is executed in a container get any.
    let program = bro_tests::bro::adopt();
    let program = program.to_str().context("text")?;
    let executed = adoption.executed(&other, &[program, "serve", "datagrams", INSIDE])?;
    executed.says("ready")?;
    ensure!(!agent.rest().iter().any(|line| line.contains("Adopted { ")), "something was adopted");
    Ok(())
}

#[test]
fn a_restart_loses_no_datagram() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    for _ in 0..2 {
        let waiting = (0..5).map(|_| says_hello(&host)).collect::<Result<Vec<_>>>()?;
        let service = adoption.service(&["datagrams", INSIDE])?;
        waiting.iter().try_for_each(expect_answered)?;
        end(service, &agent)?;
    }
    Ok(())
}

#[test]
fn a_restart_inside_the_container_and_several_workers_share_the_hosts_socket() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let program = bro_tests::bro::adopt();
    let program = program.to_str().context("text")?;
    let supervised = ["sh", "-c", r#"while :; do "$0" serve datagrams 127.0.0.1:5353; done"#, program];
    let container = adoption.container(&supervised)?;
    for _ in 0..3 {
        container.says("ready")?;
        agent.says(ADOPTED)?;
        expect_answered(&says_hello(&host)?)?;
        expect_answered_inside(&adoption, &container)?;
        let service = process::children(container.pid());
        ensure!(service.len() == 1, "{service:?}");
        kill(Pid::from_raw(service[0]), Signal::SIGKILL)?;
    }
    end(container, &agent)?;
    let workers = adoption.service(&["datagrams-workers", INSIDE])?;
    for _ in 0..2 {
        workers.says("ready")?;
        agent.says(ADOPTED)?;
    }
    for _ in 0..20 {
        expect_answered(&says_hello(&host)?)?;
    }
    Ok(())
}

#[test]
fn what_is_set_before_bind_and_after_it_is_taken_back() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let look = |level, name| bro_adopt::socket::number(host.as_fd(), level, name);
    let all = || -> Result<[i32; 5]> {
        Ok([
            look(libc::SOL_IP, libc::IP_PKTINFO)?,
            look(libc::SOL_IP, libc::IP_RECVTOS)?,
            look(libc::SOL_SOCKET, libc::SO_BROADCAST)?,
            look(libc::SOL_SOCKET, libc::SO_REUSEPORT)?,
            look(libc::SOL_SOCKET, libc::SO_RCVBUF)?,
        ])
    };
    let before = all()?;
    // Once more while there is no agent, whose successor finds it out.
    for dies_at in [None, Some("Answered(Bind)")] {
        let agent = if dies_at.is_none() { &agent } else { &adoption.agent(dies_at)? };
        let service = adoption.service(&["datagrams-options", INSIDE])?;
        service.says("ready")?;
        expect_answered(&says_hello(&host)?)?;
        let buffer = if Tells::BufferLocks.here()? { 60_000 } else { before[4] };
        ensure!(all()? == [1, 1, 1, 1, buffer], "{:?}", all()?);
        if dies_at.is_none() {
            end(service, agent)?;
            // One agent at a time.
            kill(Pid::from_raw(agent.pid()), Signal::SIGKILL)?;
            ensure!(process::ends(agent.pid(), bro_tests::peers::PATIENCE)?, "it goes on");
        } else {
            kill(Pid::from_raw(service.pid()), Signal::SIGKILL)?;
            service.wait()?;
            adoption.agent(None)?.says("Ended { listener: 0 }")?;
        }
        ensure!(all()? == before, "{:?} and not {before:?}", all()?);
    }
    Ok(())
}

#[test]
fn what_is_watched_before_it_is_bound_is_watched_after() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let early = says_hello(&host)?;
    let service = adoption.service(&["datagrams-epoll", INSIDE])?;
    service.says("ready")?;
    agent.says(ADOPTED)?;
    expect_answered(&early)?;
    for _ in 0..3 {
        expect_answered(&says_hello(&host)?)?;
    }
    expect_answered_inside(&adoption, &service)
}

/// A peer, or an end, that a service has given the host's socket would be its successors' too.
#[test]
fn a_socket_that_was_connected_or_shut_down_is_whole_for_the_next() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let client = says_hello(&host)?;
    let service = adoption.service(&["datagrams-connects", INSIDE])?;
    expect_answered(&client)?;
    service.says("connected true")?;
    end(service, &agent)?;

    let client = says_hello(&host)?;
    let service = adoption.service(&["datagrams-shut", INSIDE])?;
    expect_answered(&client)?;
    service.says("shutdown Err(ENOTCONN)")?;
    // From its own socket, which it has again.
    service.says("then Ok(0)")?;
    agent.says("GivenBack { listener: 0 }")?;
    end(service, &agent)?;

    let client = says_hello(&host)?;
    let _next = adoption.service(&["datagrams", INSIDE])?;
    expect_answered(&client)
}

#[test]
fn a_damaged_socket_is_handed_to_no_service() -> Result<()> {
    require_namespaces!();
    for how in [libc::SHUT_RD, libc::SHUT_WR] {
        let (host, adoption) = v4()?;
        let agent = adoption.agent(None)?;
        let how = if how == libc::SHUT_RD {
            nix::sys::socket::Shutdown::Read
        } else {
            nix::sys::socket::Shutdown::Write
        };
        // It fails, and is done.
        let _enotconn = nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&host), how);
        let service = adoption.service(&["datagrams", INSIDE])?;
        agent.says("NotAdopted { listener: 0, why: Damaged(ShutDown) }")?;
        service.says("ready")?;
        expect_answered_inside(&adoption, &service)?;
    }
    Ok(())
}

#[test]
fn addresses_that_are_none_fail_as_they_would_without_an_agent() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["datagrams-lies", INSIDE])?;
    for expected in [
        "no address: EFAULT",
        "an address of the kernel's: EFAULT",
        "a short one: EINVAL",
        "a long one: EINVAL",
        "a negative one: EINVAL",
        "one that is longer than an int: EINVAL",
        "another family: EAFNOSUPPORT",
        "a stream: 0",
    ] {
        let line = service.line(|_| true)?;
        ensure!(line == expected, "{line}, and not {expected}");
    }
    service.says("the right one: 0")?;
    service.says("once more: 0")?;
    agent.line(|line| line == ADOPTED)?;
    ensure!(!agent.rest().iter().any(|line| line.contains("dopted")), "more was adopted");
    expect_answered(&says_hello(&host)?)
}

/// Whatever it says while it is read: it gets the host's socket, or one of its own in its own namespace.
#[test]
fn an_address_that_changes_meanwhile_leads_to_no_other_socket() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let (own, place) = (bro_adopt::socket::cookie(host.as_fd())?, host.local_addr()?.to_string());
    let service = adoption.service(&["datagrams-race", INSIDE])?;
    let (mut adopted, mut others) = (0, 0);
    loop {
        let line = service.line(|line| line.starts_with("bound") || line == "done")?;
        let words: Vec<&str> = line.split(' ').collect();
        let ["bound", said, at, cookie] = words[..] else { break };
        if cookie == own.to_string() {
            ensure!((said, at) == ("0", place.as_str()), "{line}");
            adopted += 1;
        } else {
            let native = ["127.0.0.1:5353", "127.0.0.1:5354"].contains(&at) && said == "0";
            ensure!(native || said == "EADDRINUSE", "{line}");
            others += 1;
        }
    }
    ensure!(adopted > 0 && others > 0, "{adopted} adopted and {others} not: nothing was raced for");
    end(service, &agent)?;
    let client = says_hello(&host)?;
    let _next = adoption.service(&["datagrams", INSIDE])?;
    expect_answered(&client)
}

/// The fence is about connect(2) and bind(2): by a socket for datagrams a service sends to whatever the host reaches, without either. SECURITY.md says so.
#[test]
fn an_adopted_service_sends_to_the_hosts_own_loopback_address() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let private = UdpSocket::bind("127.0.0.1:0")?;
    private.set_read_timeout(Some(bro_tests::peers::PATIENCE))?;
    let mut service = adoption.service(&["datagrams-elsewhere", INSIDE])?;
    service.says("ready")?;
    agent.says(ADOPTED)?;
    let input = service.input.as_mut().context("an input")?;
    writeln!(input, "{}", private.local_addr()?)?;
    service.says("sent Ok(11)")?;
    let mut bytes = [0; 64];
    let (length, from) = private.recv_from(&mut bytes)?;
    ensure!(bytes[..length] == *b"from inside" && from == host.local_addr()?, "{from}");
    Ok(())
}

#[test]
fn an_agent_may_be_killed_at_every_step() -> Result<()> {
    require_namespaces!();
    for step in [
        "Received(Bind)",
        "Bound",
        "Carried",
        "Watched",
        "Kept",
        "Replaced",
        "Decided(Bind)",
        "Answered(Bind)",
    ] {
        for kind in ["datagrams", "datagrams-epoll"] {
            let (host, adoption) = v4()?;
            let first = adoption.agent(Some(step))?;
            let service = adoption.service(&[kind, INSIDE])?;
            first.wait()?;
            let early = says_hello(&host)?;
            let next = adoption.agent(None)?;
            let with = || format!("{kind} and an agent that was killed at {step}");
            service.says("ready").with_context(with)?;
            expect_answered(&early).with_context(with)?;
            expect_answered(&says_hello(&host)?).with_context(with)?;
            expect_answered_inside(&adoption, &service).with_context(with)?;
            end(service, &next).with_context(with)?;
            let _after = adoption.service(&[kind, INSIDE])?;
            expect_answered(&says_hello(&host)?).with_context(with)?;
        }
    }
    Ok(())
}

/// A question for the address of a.test, as RFC 1035 writes it.
const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01";

#[test]
fn dnsmasq_answers_outside_and_inside() -> Result<()> {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.push(Need::Program("dnsmasq", "dnsmasq-base"));
    if !met(std::thread::current().name().unwrap_or("?"), &needs) {
        return Ok(());
    }
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let ask = || -> Result<UdpSocket> {
        let client = UdpSocket::bind("127.0.0.1:0")?;
        client.connect(host.local_addr()?)?;
        client.set_read_timeout(Some(bro_tests::peers::PATIENCE))?;
        let _sent = client.send(QUESTION)?;
        Ok(client)
    };
    // As a forwarder has it: dnsmasq leaves a datagram alone of which the kernel has not noted where it came in.
    nix::sys::socket::setsockopt(&host, nix::sys::socket::sockopt::Ipv4PacketInfo, &true)?;
    let log = adoption.scratch.join("queries");
    let facility = format!("--log-facility={}", log.display());
    let dnsmasq = find_program("dnsmasq").context("dnsmasq")?;
    let arguments = [
        dnsmasq.to_str().context("text")?,
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--port=5353",
        "--no-resolv",
        "--no-hosts",
        "--user=",
        "--group=",
        "--log-queries",
        &facility,
        "--address=/a.test/192.0.2.7",
    ];
    for _ in 0..2 {
        let early = ask()?;
        let service = adoption.container(&arguments)?;
        agent.says("Adopted { listener: 0")?;
        // It has the kernel note that for itself a moment after bind(2).
        let answers = || std::fs::read_to_string(&log).is_ok_and(|said| said.contains("started"));
        ensure!(process::eventually(bro_tests::peers::PATIENCE, answers), "it does not start");
        let client = ask()?;
        for client in [&early, &client] {
            let mut answer = [0; 512];
            let length = client.recv(&mut answer).context("no answer")?;
            ensure!(answer[..length].ends_with(&[192, 0, 2, 7]), "{:?}", &answer[..length]);
        }
        let said = std::fs::read_to_string(&log)?;
        std::fs::remove_file(&log)?;
        ensure!(said.contains("query[A] a.test from 127.0.0.1"), "{said}");
        end(service, &agent)?;
    }
    Ok(())
}
