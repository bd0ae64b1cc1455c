//! What `bro activate` asks of systemd beyond starting and stopping: enable, reload, which unit a socket belongs to.

use anyhow::Context as _;
use bro_relay::listener::SocketKind;
use zbus::proxy::CacheProperties;

use super::{SystemdManager, is_running};

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
    pub listen: Vec<LiveAddress>,
    pub backlog: u32,
    /// Empty where it is bound to none.
    pub device: String,
    /// Drop-ins have a say in it besides its file.
    pub has_drop_ins: bool,
}

/// One of its sockets, as systemd says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveAddress {
    /// `None`: one of another kind than those that bro writes, such as a FIFO.
    pub kind: Option<SocketKind>,
    pub address: String,
}

impl LiveAddress {
    /// An element of the property Listen (org.freedesktop.systemd1(5)).
    fn read((kind, address): (String, String)) -> Self {
        let kind = match kind.as_str() {
            "Stream" if address.starts_with("vsock:") => Some(SocketKind::Vsock),
            "Stream" => Some(SocketKind::Stream),
            "Datagram" if address.starts_with(['/', '@']) => Some(SocketKind::UnixDatagram),
            "Datagram" => Some(SocketKind::Datagram),
            "SequentialPacket" => Some(SocketKind::SeqPacket),
            _ => None,
        };
        Self { kind, address }
    }
}

/// As an external address is written.
impl std::fmt::Display for LiveAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Some(SocketKind::UnixDatagram) => write!(f, "dgram:{}", self.address),
            Some(SocketKind::Datagram) => write!(f, "{}/udp", self.address),
            Some(SocketKind::SeqPacket) => write!(f, "seqpacket:{}", self.address),
            Some(SocketKind::Stream | SocketKind::Vsock) | None => f.write_str(&self.address),
        }
    }
}

impl SystemdManager {
    /// Reads all unit files anew; the generators run, and with them Podman's.
    pub(crate) async fn reload(&self) -> anyhow::Result<()> {
        self.systemd.reload().await.context("systemd could not reload its units")
    }

    pub(crate) async fn enable(&self, units: &[String]) -> anyhow::Result<()> {
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        self.systemd
            .enable_unit_files(&units, false, false)
            .await
            .with_context(|| format!("cannot enable {}", units.join(" ")))?;
        Ok(())
    }

    pub(crate) async fn disable(&self, units: &[String]) -> anyhow::Result<()> {
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        self.systemd
            .disable_unit_files(&units, false)
            .await
            .with_context(|| format!("cannot disable {}", units.join(" ")))?;
        Ok(())
    }

    /// What the manager keeps for a service that has ended (FileDescriptorStorePreserve=yes) is closed. One without any has nothing to clean.
    pub(crate) async fn forget_descriptors(&self, unit: &str) {
        self.systemd.clean_unit(unit, &["fdstore"]).await.ok();
    }

    pub(crate) async fn is_enabled(&self, unit: &str) -> bool {
        self.systemd.get_unit_file_state(unit).await.is_ok_and(|state| state == "enabled")
    }

    pub(crate) async fn is_active(&self, unit: &str) -> bool {
        let state = self.active_state(unit).await;
        state.is_ok_and(|state| is_running(&state))
    }

    /// A unit that systemd cannot load: why.
    pub(crate) async fn load_problem(&self, unit: &str) -> anyhow::Result<Option<String>> {
        let loaded = self.unit(unit).await?;
        Ok(match loaded.load_state().await?.as_str() {
            "loaded" => None,
            state => {
                let (_, words) = loaded.load_error().await.unwrap_or_default();
                Some(if words.is_empty() { state.to_owned() } else { words })
            }
        })
    }

    /// The unit's files have changed since they were read.
    pub(crate) async fn needs_reload(&self, unit: &str) -> bool {
        match self.unit(unit).await {
            Ok(loaded) => loaded.need_daemon_reload().await.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// It is on its way down.
    pub(crate) async fn is_stopping(&self, unit: &str) -> bool {
        self.active_state(unit).await.is_ok_and(|state| state == "deactivating")
    }

    /// How often systemd has started a service again that ends whenever it is started.
    pub(crate) async fn restart_loop(&self, unit: &str) -> anyhow::Result<Option<u32>> {
        let sub_state = self.unit(unit).await?.sub_state().await?;
        let look = self.look(unit).await?;
        // Between two tries, or in one of them.
        let is_so =
            sub_state.starts_with("auto-restart") || (look.state == "activating" && look.restarts > 0);
        Ok(is_so.then_some(look.restarts))
    }

    /// What a socket unit is now.
    pub(crate) async fn live(&self, unit: &str) -> anyhow::Result<SocketState> {
        let builder = ListeningProxy::builder(self.connection()).path(super::object_of(unit)?);
        let socket = builder.cache_properties(CacheProperties::No).build().await?;
        Ok(SocketState {
            listen: socket.listen().await?.into_iter().map(LiveAddress::read).collect(),
            backlog: socket.backlog().await?,
            device: socket.bind_to_device().await?,
            has_drop_ins: !self.unit(unit).await?.drop_in_paths().await?.is_empty(),
        })
    }

    /// The services that have failed or are just being started, again perhaps.
    pub(crate) async fn troubled_services(&self) -> anyhow::Result<Vec<String>> {
        let listed = self.systemd.list_units_by_patterns(&["activating", "failed"], &["*.service"]).await?;
        Ok(listed.into_iter().map(|(name, ..)| name).collect())
    }

    /// Forgets a failure, so that it does not stand in the way of the next start.
    pub(crate) async fn reset_failed(&self, unit: &str) {
        // There may be none to forget.
        self.systemd.reset_failed_unit(unit).await.ok();
    }

    /// The socket unit of this manager with a socket of that kind at `address`, as systemd writes it.
    pub(crate) async fn socket_at(&self, kind: SocketKind, address: &str) -> Option<String> {
        let sockets = self.systemd.list_units_by_patterns(&["active"], &["*.socket"]).await.ok()?;
        for (name, .., path, _, _, _) in sockets {
            let builder = ListeningProxy::builder(self.systemd.inner().connection()).path(path);
            let Ok(socket) = builder.cache_properties(CacheProperties::No).build().await else { continue };
            let Ok(all) = socket.listen().await else { continue };
            let mut all = all.into_iter().map(LiveAddress::read);
            if all.any(|live| live.kind == Some(kind) && live.address == address) {
                return Some(name);
            }
        }
        None
    }
}
