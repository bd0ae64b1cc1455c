//! The agent in the namespace is killed, and cannot be started: the next client has another one.

use super::*;

/// The process of `forwarder` that makes its sockets in the target's namespace.
fn agent(forwarder: &Forwarder) -> Result<i32> {
    // The first one is forked, those after it are executed.
    let is_agent = |pid: &i32| {
        process::name(*pid).as_deref() == Some("bro-agent")
            || std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == b"netns-agent"))
    };
    process::children(forwarder.pid()).into_iter().find(is_agent).context("it has no agent")
}

fn kill_agent(forwarder: &Forwarder) -> Result<()> {
    Ok(kill(Pid::from_raw(agent(forwarder)?), Signal::SIGKILL)?)
}

/// As the kernel does it when memory is short.
#[test]
fn a_killed_agent_is_started_anew_for_the_next_client() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    // While a client is held: the agent is asked for nothing before the service listens.
    let held = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    std::thread::sleep(MOMENT);
    kill_agent(&forwarder)?;
    let service = scene.serve()?;
    let held = (held, service.accept().context("for a client that was held")?);
    expect_relayed(&held.0, &held.1)?;
    // Before the next client, and so shortly before it that the forwarder has not heard of it.
    for moment in [MOMENT, Duration::ZERO] {
        kill_agent(&forwarder)?;
        std::thread::sleep(moment);
        let next = (scene.client()?, service.accept().with_context(|| format!("{moment:?} later"))?);
        expect_relayed(&next.0, &next.1)?;
    }
    expect_relayed(&held.0, &held.1).context("a connection from before")?;
    ensure!(!forwarder.log().lines().iter().any(|line| line.contains("ERROR")), "it complains");
    drop(held);
    forwarder.closings(3)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_killed_agent_of_the_own_namespace_is_started_anew_too() -> Result<()> {
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&Here, &loopback)?);
    let forwarder = Setup::new().socket(&front).arg(service.address().to_string()).start()?;
    let mut killed = 0;
    for _ in 0..6 {
        let pair = (Conn::new(&Here, front.address())?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        // It may have made sockets for more clients than one, who need no agent then.
        if agent(&forwarder).is_ok() {
            kill_agent(&forwarder)?;
            killed += 1;
        }
    }
    ensure!(killed > 1, "no other one was started");
    forwarder.stop().map(drop)
}

#[test]
fn an_agent_that_cannot_be_started_again_is_named_as_the_reason() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.setup().copy().arg(scene.target()).start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    // It is executed through /proc/self/exe, which leads to the file's own permissions.
    let permit = |mode| std::fs::set_permissions(forwarder.program(), Permissions::from_mode(mode));
    permit(0)?;
    kill_agent(&forwarder)?;
    scene.client()?.expect_abort()?;
    let told = forwarder.log().line(PATIENCE, |line| line.contains("cannot start the service"))?;
    ensure!(told.contains("sockets in the target's network namespace"), "{told}");
    permit(0o755)?;
    let next = (scene.client()?, service.accept()?);
    expect_relayed(&next.0, &next.1)?;
    expect_relayed(&pair.0, &pair.1).context("a connection from before")?;
    ensure!(forwarder.is_running()?, "it has ended");
    drop((pair, next));
    forwarder.stop().map(drop)
}
