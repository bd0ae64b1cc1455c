//! Adoption without Podman: an agent (`adopt agent`), what stands for the service manager's store, and an OCI runtime
//! (`adopt run`) that gives a program its own network namespace and the filter that notifies.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::forwarder::Setup;
use crate::netns::Namespace;
use crate::peers::PATIENCE;
use crate::process::Session;
use crate::scratch::Scratch;
use crate::{bro, sys};

type Kept = Arc<Mutex<BTreeMap<String, OwnedFd>>>;

/// What a container was created with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// A filter that notifies.
    Notifies,
    /// None.
    None,
}

/// The service manager's file descriptor store (sd_notify(3)).
#[derive(Debug)]
struct Store {
    path: PathBuf,
    kept: Kept,
    /// Every line that was not about descriptors.
    said: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Store {
    fn new(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (kept, ended) = (Kept::default(), Arc::new(AtomicBool::new(false)));
        let (to, until) = (kept.clone(), ended.clone());
        let said = Arc::<Mutex<Vec<String>>>::default();
        let lines = said.clone();
        let thread = std::thread::spawn(move || {
            while !until.load(SeqCst) {
                let mut text = [0; 512];
                let received = bro_relay::sys::receive_with_descriptors(socket.as_fd(), &mut text);
                let Ok((length, descriptors)) = received else { continue };
                let text = String::from_utf8_lossy(&text[..length]).into_owned();
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
                let mut kept = to.lock().expect("no holder of this lock panics");
                if text.contains("FDSTOREREMOVE=1") {
                    let removed = kept.remove(name);
                    // systemd has a thread of its own close it (`asynchronous_close`), and so at any time later.
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(200));
                        drop(removed);
                    });
                } else if text.contains("FDSTORE=1") {
                    kept.extend(descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
                } else {
                    let mut said = lines.lock().expect("no holder of this lock panics");
                    said.extend(text.lines().map(str::to_owned));
                }
                // BARRIER=1: its descriptor is closed here, after all that came before it.
            }
        });
        Ok(Self { path: path.to_owned(), kept, said, ended, thread: Some(thread) })
    }

    /// All that has been sent is taken: systemd too looks at its notification socket before it hears of a process's end.
    fn settle(&self) -> Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(&self.path)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        bro_relay::sys::send_with_descriptors(socket.as_fd(), b"BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        ensure!((&ours).read(&mut [0])? == 0, "the store hangs");
        Ok(())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.ended.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// A program whose lines are read as they come. It ends with the value.
#[derive(Debug)]
pub struct Program {
    /// Its standard input.
    pub input: Option<ChildStdin>,
    session: Session,
    lines: Receiver<String>,
}

impl Program {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child: Child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting a program")?;
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().context("it has an output")?);
        std::thread::spawn(move || {
            output
                .lines()
                .map_while(Result::ok)
                .take_while(|line| sender.send(line.clone()).is_ok())
                .for_each(drop);
        });
        let input = child.stdin.take();
        Ok(Self { input, session: Session(child), lines })
    }

    /// Its next line that `wanted` takes.
    pub fn line(&self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut passed = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if wanted(&line) => return Ok(line),
                Ok(line) => passed.push(line),
                Err(error) => bail!("no such line ({error}), only {passed:?}"),
            }
        }
    }

    /// Waits for a line with this text.
    pub fn says(&self, text: &str) -> Result<String> {
        self.line(|line| line.contains(text)).with_context(|| format!("waiting for “{text}”"))
    }

    /// What it has said and was not read.
    #[must_use]
    pub fn rest(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.session.0.id().cast_signed()
    }

    /// Ends it at once, and with it the container that it is the first process of.
    ///
    /// # Errors
    /// kill(2)'s; when it does not end.
    pub fn end(self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL)?;
        self.wait().map(drop)
    }

    /// Waits for its end, however that comes.
    pub fn wait(mut self) -> Result<std::process::ExitStatus> {
        let ended = crate::process::ends(self.pid(), PATIENCE)?;
        ensure!(ended, "it goes on");
        Ok(self.session.0.wait()?)
    }
}

/// Where adoption takes place: the listeners, as systemd would hold them, the socket at `listenerPath`, and the store.
#[derive(Debug)]
pub struct Adoption {
    /// For files of the test.
    pub scratch: Scratch,
    listeners: Vec<(OwnedFd, String)>,
    seccomp: OwnedFd,
    store: Store,
    program: PathBuf,
    uid: Option<u32>,
}

impl Adoption {
    /// With these listeners, each with the place in the container that it is for.
    pub fn new(listeners: Vec<(OwnedFd, String)>) -> Result<Self> {
        Self::as_user(listeners, None)
    }

    /// The same, where agent and container are this user's.
    pub fn as_user(listeners: Vec<(OwnedFd, String)>, uid: Option<u32>) -> Result<Self> {
        let scratch = Scratch::new()?;
        let path = scratch.join("seccomp");
        let seccomp = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777))?;
        let store = Store::new(&scratch.join("notify"))?;
        let program = if uid.is_some() { bro::copy(&bro::adopt(), scratch.path())? } else { bro::adopt() };
        Ok(Self { scratch, listeners, seccomp: seccomp.into(), store, program, uid })
    }

    /// One listener more, from the next agent or forwarder on; `number` says before which of the others.
    pub fn insert(&mut self, number: usize, listener: OwnedFd, target: &str) {
        self.listeners.insert(number, (listener, target.to_owned()));
    }

    fn launch(&self) -> Command {
        let mut command = Command::new(bro::helper());
        command.arg("launch");
        if let Some(uid) = self.uid {
            command.arg(format!("uid={uid}"));
        }
        command.arg("--").arg(&self.program).current_dir(self.scratch.path());
        command
    }

    /// Starts an agent with all that is in the store, to be killed by SIGKILL at this step.
    pub fn agent(&self, dies_at: Option<&str>) -> Result<Program> {
        self.store.settle()?;
        let stored: Vec<(String, OwnedFd)> = {
            let kept = self.store.kept.lock().expect("no holder of this lock panics");
            kept.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?))).collect::<Result<_>>()?
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![self.seccomp.as_fd()];
        descriptors.extend(self.listeners.iter().map(|(socket, _)| socket.as_fd()));
        descriptors.extend(stored.iter().map(|(_, descriptor)| descriptor.as_fd()));
        let mut command = self.launch();
        let target = |(socket, target): &(OwnedFd, String)| match bro_adopt::socket::Place::of(socket.as_fd())
        {
            Some(bro_adopt::socket::Place::Udp(_)) => format!("udp:{target}"),
            _ => target.clone(),
        };
        command.arg("agent").args(self.listeners.iter().map(target)).arg("--");
        command.args(stored.iter().map(|(name, _)| name)).env("NOTIFY_SOCKET", self.scratch.join("notify"));
        if let Some(step) = dies_at {
            command.env("DIES_AT", step);
        }
        sys::pass_fds(&mut command, &descriptors)?;
        let agent = Program::start(&mut command)?;
        agent.says("answering")?;
        Ok(agent)
    }

    /// A container: this program in a network namespace of its own, notified.
    pub fn container(&self, program: &[&str]) -> Result<Program> {
        let seccomp = self.scratch.join("seccomp");
        let mut command = self.launch();
        command.arg("run").arg(seccomp).args(program);
        Program::start(&mut command)
    }

    /// A command that is executed in a container.
    pub fn executed(&self, container: &Program, program: &[&str]) -> Result<Program> {
        let seccomp = self.scratch.join("seccomp");
        let mut command = self.launch();
        command.arg("executed").arg(container.pid().to_string()).arg(seccomp).args(program);
        Program::start(&mut command)
    }

    /// One of this program's small services in a container.
    pub fn service(&self, arguments: &[&str]) -> Result<Program> {
        let program = self.program.to_str().context("a path of this machine is text")?;
        self.container(&[&[program, "serve"], arguments].concat())
    }

    /// A forwarder in the agent's place, towards services in this namespace: with the listeners, the seccomp socket and all that is in the store.
    pub fn forwarder(&self, namespace: &Namespace) -> Result<Setup> {
        self.forwarder_that("--adopt", namespace)
    }

    /// The same with another form of that option.
    pub fn forwarder_that(&self, adopts: &str, namespace: &Namespace) -> Result<Setup> {
        self.store.settle()?;
        let mut setup = Setup::new().arg(adopts).netns(namespace);
        setup = setup.env("NOTIFY_SOCKET", self.scratch.join("notify"));
        for (number, (socket, target)) in self.listeners.iter().enumerate() {
            let name = format!("socket-{number}");
            // So does systemd each time it passes a socket (`NonBlocking=no`).
            let _zero = nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_RDWR))?;
            setup = setup.descriptor(socket.try_clone()?, &name).arg(format!("--target={name}={target}"));
        }
        setup = setup.descriptor(self.seccomp.try_clone()?, "seccomp");
        for (name, descriptor) in self.store.kept.lock().expect("no holder of this lock panics").iter() {
            setup = setup.descriptor(descriptor.try_clone()?, name);
        }
        Ok(setup)
    }

    /// The same in a container whose network namespace this is.
    pub fn container_in(&self, namespace: &Namespace, program: &[&str]) -> Result<Program> {
        let mut command = self.launch();
        command
            .arg("joined")
            .arg(namespace.pid().to_string())
            .arg(self.scratch.join("seccomp"))
            .args(program);
        Program::start(&mut command)
    }

    /// One of this program's small services in a container whose network namespace this is, or with `without_profile` in one that no filter was
    /// made for.
    pub fn service_in(&self, namespace: &Namespace, profile: Profile, arguments: &[&str]) -> Result<Program> {
        let program = self.program.to_str().context("a path of this machine is text")?;
        let mut command = match profile {
            Profile::Notifies => {
                let mut command = self.launch();
                command.arg("joined").arg(namespace.pid().to_string()).arg(self.scratch.join("seccomp"));
                command
            }
            Profile::None => {
                let words = namespace.enter();
                let mut command = Command::new(&words[0]);
                command.args(&words[1..]);
                command
            }
        };
        command.arg(program).arg("serve").args(arguments);
        Program::start(&mut command)
    }

    /// The process that speaks for the service, after a takeover.
    pub fn main_process(&self, but: i32) -> Result<i32> {
        let found = || {
            let said = self.store.said.lock().expect("no holder of this lock panics");
            let mut pids = said.iter().filter_map(|line| line.strip_prefix("MAINPID=")?.parse().ok());
            pids.rfind(|pid: &i32| *pid != but)
        };
        ensure!(
            crate::process::eventually(PATIENCE, || found().is_some()),
            "no other process has taken over"
        );
        found().context("a process")
    }

    /// What is in the store.
    #[must_use]
    pub fn stored(&self) -> Vec<String> {
        self.store.kept.lock().expect("no holder of this lock panics").keys().cloned().collect()
    }
}

/// A socket for datagrams of the host's, and what is passed of it, at this address and a port of the kernel's choice: bound to that by its number, as
/// systemd's is.
pub fn datagrams(address: &str) -> Result<(UdpSocket, OwnedFd)> {
    let free = UdpSocket::bind(address)?.local_addr()?;
    let host = UdpSocket::bind(free)?;
    let passed = host.try_clone()?.into();
    Ok((host, passed))
}

/// A client of this socket for datagrams, which has said something.
pub fn says_hello(host: &UdpSocket) -> Result<UdpSocket> {
    let at = host.local_addr()?;
    let client = UdpSocket::bind(if at.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" })?;
    client.connect(at)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let _sent = client.send(b"hello")?;
    Ok(client)
}

/// What the client gets.
pub fn answered(client: &UdpSocket) -> Result<String> {
    let mut answer = [0; 512];
    let length = client.recv(&mut answer).context("there is no answer")?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// The service tells the client its own address: it has received the datagram itself.
pub fn expect_answered(client: &UdpSocket) -> Result<()> {
    let (own, said) = (client.local_addr()?.to_string(), answered(client)?);
    ensure!(said == own, "the client {own} was told {said:?}");
    Ok(())
}

/// What a kernel may not tell of a socket; adoption goes without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tells {
    /// Its network namespace: SO_NETNS_COOKIE, Linux 5.14.
    Namespace,
    /// Which sizes of its buffers were set by hand: SO_BUF_LOCK, Linux 5.14. Where it does not, none is carried over.
    BufferLocks,
}

impl Tells {
    /// Does this kernel?
    pub fn here(self) -> Result<bool> {
        let option = match self {
            Self::Namespace => 71,
            Self::BufferLocks => 72,
        };
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        // EINVAL of one that has no room for the answer is an answer.
        let asked = bro_adopt::socket::number(socket.as_fd(), nix::libc::SOL_SOCKET, option);
        Ok(!asked.is_err_and(|error| error.raw_os_error() == Some(nix::libc::ENOPROTOOPT)))
    }
}

/// The first two numbers of this kernel's version, for what nothing else tells.
pub fn kernel() -> Result<(u32, u32)> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    Ok((numbers.next().context("a version")?, numbers.next().context("a version")?))
}

/// A client of this listener.
pub fn client(host: &TcpListener) -> Result<TcpStream> {
    let client = TcpStream::connect(host.local_addr()?)?;
    client.set_read_timeout(Some(PATIENCE))?;
    Ok(client)
}

/// All that a client is told until the end.
pub fn told(mut client: TcpStream) -> Result<String> {
    let mut said = String::new();
    client.read_to_string(&mut said)?;
    Ok(said)
}

/// The service tells a client, which was there before it or comes now, its own address: it has accepted the client itself.
pub fn expect_greeted(client: TcpStream) -> Result<()> {
    let own = client.local_addr()?.to_string();
    let said = told(client)?;
    ensure!(said == own, "the client {own} was told {said:?}");
    Ok(())
}
