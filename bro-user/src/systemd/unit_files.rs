//! What `bro activate` asks of systemd beyond starting and stopping: enable, reload, whose socket it is.

use anyhow::Context as _;
use zbus::OwnedObjectPath;

use super::manager::{self, Bus};
use super::scope::RuntimeScope;
use crate::run_as::RunAsUser;

/// `(ssssssouso)`: a unit as ListUnits describes it; the first is its name, the seventh its object.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// Kind, link and destination of each change that enabling or disabling made.
type Links = Vec<(String, String, String)>;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Files {
    fn reload(&self) -> zbus::Result<()>;
    fn enable_unit_files(&self, files: &[&str], runtime: bool, force: bool) -> zbus::Result<(bool, Links)>;
    fn disable_unit_files(&self, files: &[&str], runtime: bool) -> zbus::Result<Links>;
    fn get_unit_file_state(&self, file: &str) -> zbus::Result<String>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<Listed>>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait Loaded {
    #[zbus(property(emits_changed_signal = "false"))]
    fn sub_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_error(&self) -> zbus::Result<(String, String)>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn need_daemon_reload(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn drop_in_paths(&self) -> zbus::Result<Vec<String>>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Socket", default_service = "org.freedesktop.systemd1")]
trait Listening {
    #[zbus(property(emits_changed_signal = "false"))]
    fn listen(&self) -> zbus::Result<Vec<(String, String)>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn backlog(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn bind_to_device(&self) -> zbus::Result<String>;
}

/// A socket unit as systemd has it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SocketState {
    /// Its addresses.
    pub listen: Vec<String>,
    pub backlog: u32,
    /// Empty where it is bound to none.
    pub device: String,
    /// Somebody has a say in it besides its file.
    pub has_drop_ins: bool,
}

/// A service manager.
#[derive(Debug)]
pub(crate) struct Systemd {
    pub bus: Bus,
    files: FilesProxy<'static>,
}

impl Systemd {
    pub async fn connect(manager: RuntimeScope) -> anyhow::Result<Self> {
        Self::over(Bus::connect(manager).await?).await
    }

    /// By a connection that is there already.
    pub async fn over(bus: Bus) -> anyhow::Result<Self> {
        let files = FilesProxy::new(bus.connection()).await?;
        Ok(Self { bus, files })
    }

    /// The service manager of a user whom root does something for.
    pub async fn of(owner: &RunAsUser) -> anyhow::Result<Self> {
        Self::over(Bus::connect_as(owner).await?).await
    }

    /// Reads all unit files anew; the generators run, and with them Podman's.
    pub async fn reload(&self) -> anyhow::Result<()> {
        self.files.reload().await.context("systemd could not reload its units")
    }

    pub async fn enable(&self, units: &[String]) -> anyhow::Result<()> {
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        self.files
            .enable_unit_files(&units, false, false)
            .await
            .with_context(|| format!("cannot enable {}", units.join(" ")))?;
        Ok(())
    }

    pub async fn disable(&self, units: &[String]) -> anyhow::Result<()> {
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        self.files
            .disable_unit_files(&units, false)
            .await
            .with_context(|| format!("cannot disable {}", units.join(" ")))?;
        Ok(())
    }

    pub async fn is_enabled(&self, unit: &str) -> bool {
        self.files.get_unit_file_state(unit).await.is_ok_and(|state| state == "enabled")
    }

    pub async fn is_active(&self, unit: &str) -> bool {
        let state = self.bus.active_state(unit).await;
        state.is_ok_and(|state| manager::is_running(&state))
    }

    /// A unit that systemd cannot load: why.
    pub async fn load_problem(&self, unit: &str) -> anyhow::Result<Option<String>> {
        let loaded = self.loaded(unit).await?;
        Ok(match loaded.load_state().await?.as_str() {
            "loaded" => None,
            state => {
                let (_, words) = loaded.load_error().await.unwrap_or_default();
                Some(if words.is_empty() { state.to_owned() } else { words })
            }
        })
    }

    /// The unit's files have changed since they were read.
    pub async fn needs_reload(&self, unit: &str) -> bool {
        match self.loaded(unit).await {
            Ok(loaded) => loaded.need_daemon_reload().await.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// It is on its way down.
    pub async fn is_stopping(&self, unit: &str) -> bool {
        self.bus.active_state(unit).await.is_ok_and(|state| state == "deactivating")
    }

    /// A service that ends whenever it is started, and that systemd starts again: how often it has done so.
    pub async fn restarting(&self, unit: &str) -> anyhow::Result<Option<u32>> {
        let sub_state = self.loaded(unit).await?.sub_state().await?;
        let look = self.bus.look(unit).await?;
        // Between two tries, or in one of them.
        let is_so =
            sub_state.starts_with("auto-restart") || (look.state == "activating" && look.restarts > 0);
        Ok(is_so.then_some(look.restarts))
    }

    /// What a socket unit is now.
    pub async fn live(&self, unit: &str) -> anyhow::Result<SocketState> {
        let path = self.files.load_unit(unit).await?;
        let builder = ListeningProxy::builder(self.files.inner().connection()).path(path);
        let socket = builder.build().await?;
        Ok(SocketState {
            listen: socket.listen().await?.into_iter().map(|(_, address)| address).collect(),
            backlog: socket.backlog().await?,
            device: socket.bind_to_device().await?,
            has_drop_ins: !self.loaded(unit).await?.drop_in_paths().await?.is_empty(),
        })
    }

    async fn loaded(&self, unit: &str) -> anyhow::Result<LoadedProxy<'static>> {
        let path = self.files.load_unit(unit).await?;
        Ok(LoadedProxy::builder(self.files.inner().connection()).path(path).build().await?)
    }

    /// The services that have failed or are just being started, again perhaps.
    pub async fn troubled_services(&self) -> anyhow::Result<Vec<String>> {
        let listed = self.files.list_units_by_patterns(&["activating", "failed"], &["*.service"]).await?;
        Ok(listed.into_iter().map(|(name, ..)| name).collect())
    }

    /// Forgets a failure, so that it does not stand in the way of the next start.
    pub async fn reset_failed(&self, unit: &str) {
        // There may be none to forget.
        self.files.reset_failed_unit(unit).await.ok();
    }

    /// The socket unit of this manager that listens at `address`, as systemd writes it.
    pub async fn socket_at(&self, address: &str) -> Option<String> {
        let sockets = self.files.list_units_by_patterns(&["active"], &["*.socket"]).await.ok()?;
        for (name, .., path, _, _, _) in sockets {
            let builder = ListeningProxy::builder(self.files.inner().connection()).path(path);
            let Ok(socket) = builder.build().await else { continue };
            if socket.listen().await.is_ok_and(|all| all.iter().any(|(_, listening)| listening == address)) {
                return Some(name);
            }
        }
        None
    }
}
