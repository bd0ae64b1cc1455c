//! The kernel relay's programs, from the control process: loaded on a thread of their own, which keeps the rights for it until
//! they are attached where the container is, and no longer.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use bro_relay::engine::lanes::ServiceWatch;
use bro_relay::engine::protocol::EngineCommand;
use bro_sockmap::{Bequest, Config, Descriptors, Kernel, Programs, Share, Unavailable};
use tokio::sync::oneshot;

use super::kernel_defect::{self, Knowledge};
use crate::netns::Namespace;
use crate::relay_handle::Handle;

/// How long the thread may take to answer: it may just be attaching.
const BEQUEST_LIMIT: Duration = Duration::from_secs(1);

/// The loaded and tested kernel relay.
#[derive(Debug)]
pub struct LoadedRelay {
    /// Its maps.
    pub descriptors: Descriptors,
    /// What the engine has to know about them.
    pub share: Share,
    /// The thread that attaches its programs.
    pub attacher: Attacher,
}

/// The thread that has loaded the programs and holds them.
#[derive(Debug, Clone)]
pub struct Attacher(mpsc::Sender<AttacherOrder>);

/// What the thread is asked to do.
#[derive(Debug)]
enum AttacherOrder {
    /// To attach them.
    Attach {
        cgroup: PathBuf,
        /// The cgroup is that of local clients, and not the last; a service's is: new incarnations of a container come to the same
        /// cgroup, so the rights for it are not needed any more.
        clients: bool,
        done: oneshot::Sender<Result<(), Unavailable>>,
    },
    /// What a successor gets; `older`: predecessors still have connections.
    Bequeath { older: bool, to: oneshot::Sender<Result<Option<Bequest>, Unavailable>> },
    /// The successor has it.
    Leave,
}

/// Loads and tests the kernel relay on a thread of its own: it takes tens of milliseconds, which the first client must not wait
/// for while its service is starting.
#[must_use]
pub fn load(
    config: Config,
    bequest: Option<Bequest>,
) -> Option<oneshot::Receiver<Result<LoadedRelay, Unavailable>>> {
    let (to, loaded) = oneshot::channel();
    let work = move || match obtain(&config, bequest) {
        Ok(kernel) => {
            let (programs, descriptors, share) = kernel.into_parts();
            let (orders, inbox) = mpsc::channel();
            // The forwarder may have ended meanwhile.
            drop(to.send(Ok(LoadedRelay { descriptors, share, attacher: Attacher(orders) })));
            serve(programs, &inbox);
        }
        Err(reason) => drop(to.send(Err(reason))),
    };
    std::thread::Builder::new().name("bro-load".into()).spawn(work).ok()?;
    Some(loaded)
}

/// The kernel relay, without lasting use of memory: reading the kernel's types takes megabytes for a moment.
fn obtain(config: &Config, bequest: Option<Bequest>) -> Result<Kernel, Unavailable> {
    let looker = if config.bear_fionread || bequest.is_some() {
        None
    } else {
        match kernel_defect::knowledge(bro_sockmap::capabilities::may_load_programs()) {
            Knowledge::Lies => return Err(Unavailable::FionreadLies),
            Knowledge::Looking(looker) => Some(looker),
            Knowledge::Right | Knowledge::Unknown => None,
        }
    };
    let kernel = Kernel::obtain(config, bequest);
    if let Some(looker) = looker {
        match &kernel {
            Ok(kernel) => looker.found(kernel.fionread_lies()),
            Err(Unavailable::FionreadLies) => looker.found(true),
            // It did not come to that.
            Err(_) => drop(looker),
        }
    }
    bro_relay::sys::return_freed_memory();
    kernel
}

/// Attaches the programs as ordered, and holds them until no caller can order any more.
fn serve(mut programs: Programs, inbox: &mpsc::Receiver<AttacherOrder>) {
    let (mut dropped, mut left) = (false, false);
    for order in inbox {
        // The caller may have given up.
        match order {
            AttacherOrder::Attach { cgroup, clients, done } => {
                let hooked = if clients { programs.hook_clients() } else { Ok(()) };
                let attached = hooked.and_then(|()| programs.attach(&cgroup));
                if !clients && attached.is_ok() && !std::mem::replace(&mut dropped, true) {
                    bro_sockmap::capabilities::drop_the_kernel_relays(false);
                }
                drop(done.send(attached));
            }
            AttacherOrder::Bequeath { older, to } => drop(to.send(programs.bequest(older))),
            AttacherOrder::Leave => left = true,
        }
    }
    if left {
        programs.leave();
    }
}

impl Attacher {
    /// Has the programs look at the sockets made in a cgroup from now on: that of local clients, or a service's.
    ///
    /// # Errors
    /// As [`Programs::attach`].
    pub async fn attach(&self, cgroup: &Path, clients: bool) -> Result<(), Unavailable> {
        let (done, attached) = oneshot::channel();
        let ended = || Unavailable::SelfTest("the thread that holds the programs has ended".into());
        self.0.send(AttacherOrder::Attach { cgroup: cgroup.into(), clients, done }).map_err(|_| ended())?;
        attached.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Whether there are programs to watch with.
#[derive(Debug)]
enum ProgramsState {
    /// Not known yet; with what the programs are to watch then, by target.
    Loading(HashMap<usize, WatchedService>),
    /// There are programs; with the one that hooks a sender.
    Loaded(Attacher, Arc<OwnedFd>),
    /// There are none.
    Unavailable,
}

/// A service to be watched.
#[derive(Debug)]
pub struct WatchedService {
    /// For what.
    pub watch: ServiceWatch,
    /// The cgroup that it and this forwarder share.
    pub cgroup: PathBuf,
    /// Where it is: its agent hooks its sockets.
    pub namespace: Arc<Namespace>,
}

/// What the programs watch.
#[derive(Debug)]
pub struct Watching {
    engine: Arc<Handle>,
    state: Mutex<ProgramsState>,
}

impl Watching {
    /// Nothing yet: the programs are being loaded.
    #[must_use]
    pub fn new(engine: Arc<Handle>) -> Self {
        Self { engine, state: Mutex::new(ProgramsState::Loading(HashMap::new())) }
    }

    /// They are loaded: attaches them to the cgroup of local clients, where the administrator asked for that, hands their maps to
    /// the engine, and has them watch what has been woken meanwhile.
    pub async fn loaded(&self, loaded: LoadedRelay, local_clients: Option<&Path>) {
        let LoadedRelay { descriptors, share, attacher } = loaded;
        let mut clients = false;
        if let Some(cgroup) = local_clients {
            match attacher.attach(cgroup, true).await {
                Ok(()) => clients = true,
                Err(error) => tracing::warn!("no lane for local clients: {error} ({})", error.mend()),
            }
        }
        let hook = match descriptors.hook.try_clone() {
            Ok(hook) => Arc::new(hook),
            Err(error) => {
                tracing::warn!(%error, "the kernel relay cannot be used; splicing instead");
                return self.unavailable();
            }
        };
        self.engine.send(EngineCommand::Kernel { descriptors, share, clients });
        let before = std::mem::replace(&mut *self.state(), ProgramsState::Loaded(attacher, hook));
        let ProgramsState::Loading(waiting) = before else { return };
        for service in waiting.into_values() {
            let _told_too_late = self.watch(service).await;
        }
    }

    /// There are none.
    pub fn unavailable(&self) {
        *self.state() = ProgramsState::Unavailable;
    }

    /// Has the programs watch a target's service in a cgroup; says whether they will tell when it listens. While they are being
    /// loaded, the caller looks for listeners in another way.
    pub async fn watch(&self, service: WatchedService) -> bool {
        let (attacher, hook) = match &mut *self.state() {
            ProgramsState::Loading(waiting) => {
                waiting.insert(service.watch.target, service);
                return false;
            }
            ProgramsState::Unavailable => return false,
            ProgramsState::Loaded(attacher, hook) => (attacher.clone(), hook.clone()),
        };
        let WatchedService { watch, cgroup, namespace } = service;
        if let Err(error) = namespace.program(hook.as_fd()).await {
            tracing::debug!(%error, "no kernel lane for the service");
            return false;
        }
        let ports = match attacher.attach(&cgroup, false).await {
            Ok(()) => watch.ports,
            Err(error) => {
                tracing::warn!("no kernel lane for the service: {error} ({})", error.mend());
                Vec::new()
            }
        };
        self.engine.watch(ServiceWatch { ports, ..watch }).await.unwrap_or(false)
    }

    /// What a successor gets of the kernel relay; `older`: predecessors of this process still have connections.
    pub async fn bequest(&self, older: bool) -> Option<Bequest> {
        let (to, bequest) = oneshot::channel();
        match &*self.state() {
            ProgramsState::Loaded(Attacher(orders), _) => {
                orders.send(AttacherOrder::Bequeath { older, to }).ok()?
            }
            ProgramsState::Loading(_) | ProgramsState::Unavailable => return None,
        }
        let bequest = tokio::time::timeout(BEQUEST_LIMIT, bequest).await.ok()?.ok()?;
        bequest.unwrap_or_else(|error| {
            tracing::warn!("the successor gets nothing of the kernel relay: {error}");
            None
        })
    }

    /// The successor has taken over: this process's end is not the end of what it has left.
    pub fn leave(&self) {
        if let ProgramsState::Loaded(Attacher(orders), _) = &*self.state() {
            orders.send(AttacherOrder::Leave).ok();
        }
    }

    fn state(&self) -> MutexGuard<'_, ProgramsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
