//! Quadlets: the file, the unit that Podman's generator makes of it, and the container that then runs (podman-systemd.unit(5)).
//! Only what `bro activate` has to know is read; the generator stays the judge of the rest.

mod search;
mod specifiers;

use std::path::{Path, PathBuf};

use crate::exit::Failure;
use crate::run_as::RunAsUser;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::UnitFile;

pub use search::drop_in_directory;

/// What a quadlet describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuadletKind {
    /// One container.
    Container,
    /// A pod; its containers are quadlets of their own.
    Pod,
    /// Pods from a Kubernetes file.
    Kube,
}

impl QuadletKind {
    const ALL: [Self; 3] = [Self::Container, Self::Pod, Self::Kube];

    /// Its file's extension.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Pod => "pod",
            Self::Kube => "kube",
        }
    }

    /// Its own section.
    #[must_use]
    pub const fn section(self) -> &'static str {
        match self {
            Self::Container => "Container",
            Self::Pod => "Pod",
            Self::Kube => "Kube",
        }
    }
}

/// A quadlet that was found and read.
#[derive(Debug, Clone)]
pub struct Quadlet {
    /// Its name without the extension: `web`, or `web@blue` for an instance of a template.
    pub name: String,
    /// What it describes.
    pub kind: QuadletKind,
    /// Its file; a template's for an instance without a link of its own.
    pub path: PathBuf,
    /// What the file and its drop-ins say together, without those of `bro activate`.
    pub file: UnitFile,
    /// The unit that the generator makes: `web.service`, `app-pod.service`.
    pub unit: String,
    /// The container with the network namespace of the service, where it can be known.
    pub container: Result<String, String>,
}

impl Quadlet {
    /// A setting of its own section that has one value.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        value(&self.file, self.kind, key)
    }

    /// A list of its own section, one entry per assignment.
    #[must_use]
    pub fn values(&self, key: &str) -> Vec<&str> {
        self.file.values(self.kind.section(), key)
    }

    /// `Network=host`: there is no namespace to enter.
    #[must_use]
    pub fn is_on_host(&self) -> bool {
        self.values("Network") == ["host"]
    }

    /// The file's own name.
    #[must_use]
    pub fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The file that was found is a template's, for an instance that has none of its own.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.path.file_stem().is_some_and(|stem| stem.as_encoded_bytes().ends_with(b"@"))
    }

    /// The place on the host that a `Volume=` shares, if it is one and bro can tell which.
    #[must_use]
    pub fn shares(&self, volume: &str, owner: Option<&RunAsUser>) -> Option<PathBuf> {
        // SOURCE:DESTINATION[:OPTIONS]; DESTINATION alone is an anonymous volume, and any other SOURCE a volume's name.
        let (source, _) = volume.split_once(':')?;
        let source = specifiers::expand(source, &self.unit, owner).ok()?;
        match source.strip_prefix("./").or_else(|| (source == ".").then_some("")) {
            Some(beside) => Some(self.path.parent()?.join(beside)),
            None if source.starts_with("../") => Some(self.path.parent()?.join(source)),
            None => source.starts_with('/').then(|| source.into()),
        }
    }

    /// What it runs, as far as names tell: the image's, and those of the programs that Exec= and Entrypoint= name.
    #[must_use]
    pub fn programs(&self) -> Vec<String> {
        let last = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
        let image = self
            .value("Image")
            .map(|image| last(image).split([':', '@']).next().unwrap_or_default().to_owned());
        let runs = self.file.words(self.kind.section(), "Exec").first().map(|program| last(program));
        let enters = self.value("Entrypoint").map(last);
        [image, runs, enters].into_iter().flatten().collect()
    }

    /// `text` with the specifiers replaced, as in the unit.
    ///
    /// # Errors
    /// The first specifier that is not known here.
    pub fn expand(&self, text: &str, owner: Option<&RunAsUser>) -> Result<String, String> {
        specifiers::expand(text, &self.unit, owner)
    }

    /// Does it run nginx? Seen from the image's name and the command.
    #[must_use]
    pub fn is_nginx(&self) -> bool {
        let named = |path: &str| {
            path.rsplit('/')
                .next()
                .is_some_and(|last| last.split([':', '@']).next().is_some_and(|name| name.contains("nginx")))
        };
        let runs = self.file.words(self.kind.section(), "Exec");
        self.value("Image").is_some_and(named)
            || runs.first().is_some_and(|program| program.rsplit('/').next() == Some("nginx"))
            || self.value("Entrypoint").is_some_and(|program| program.rsplit('/').next() == Some("nginx"))
    }
}

/// One value, as Podman's generator reads it: without the double quotes around it. (In lists the generator keeps them.)
fn value<'a>(file: &'a UnitFile, kind: QuadletKind, key: &str) -> Option<&'a str> {
    let value = file.value(kind.section(), key)?;
    let bare = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    Some(bare.unwrap_or(value)).filter(|value| !value.is_empty())
}

/// Finds and reads the quadlet `name` (with or without an extension) where Podman looks for it, below `root`; with `owner`, where
/// that user's Podman looks.
///
/// # Errors
/// [`Failure::NotFound`], or [`Failure::Usage`] for a name that no quadlet can have or that two have.
pub fn find(
    name: &str,
    scope: RuntimeScope,
    owner: Option<&RunAsUser>,
    root: Option<&Path>,
) -> anyhow::Result<Quadlet> {
    let (stem, kinds) = parse_name(name)?;
    let directories = search::directories(scope, owner, root)?;
    // bro reads a user's files, and what they link to, with that user's rights.
    let _acting = owner.filter(|_| root.is_none()).map(RunAsUser::act).transpose()?;
    let mut found: Vec<(QuadletKind, PathBuf)> = Vec::new();
    for &kind in &kinds {
        if let Some(path) = search::file(&directories, &stem, kind)? {
            found.push((kind, path));
        }
    }
    let (kind, path) = match found.as_slice() {
        [] => return Err(not_found(&stem, &kinds, &directories).into()),
        [one] => one.clone(),
        several => {
            let names: Vec<String> =
                several.iter().map(|(kind, _)| format!("{stem}.{}", kind.extension())).collect();
            return Err(
                Failure::Usage(format!("there are {}: say which one is meant", names.join(" and "))).into()
            );
        }
    };
    check_path(&path)?;
    let file = search::read(&directories, &stem, kind, &path)?;
    if !file.has_section(kind.section()) {
        return Err(
            Failure::NotFound(format!("{} has no section [{}]", path.display(), kind.section())).into()
        );
    }
    let unit = unit(&stem, kind, &file, &path)?;
    let container = container(&stem, kind, &file, &unit, owner);
    Ok(Quadlet { name: stem, kind, path, file, unit, container })
}

/// The path becomes part of units, and the owner of a directory has chosen its name.
fn check_path(path: &Path) -> Result<(), Failure> {
    if crate::systemd::unit_file::holds_path(path) {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "the quadlet lies in “{}”, a name with characters that no unit file can hold (control characters, or none of UTF-8); \
         move it to another directory",
        path.parent().unwrap_or(path).to_string_lossy().escape_debug()
    )))
}

/// Splits `web.container` into its stem and the kinds it may be of.
pub(crate) fn parse_name(name: &str) -> Result<(String, Vec<QuadletKind>), Failure> {
    const OTHERS: [&str; 4] = [".network", ".volume", ".image", ".build"];
    let usage = |text: String| Err(Failure::Usage(text));
    if let Some(other) = OTHERS.iter().find(|other| name.ends_with(**other)) {
        return usage(format!(
            "“{name}” is no service that could be woken: a {other} only prepares something for one"
        ));
    }
    let known = QuadletKind::ALL.iter().find_map(|kind| {
        name.strip_suffix(kind.extension())
            .and_then(|stem| stem.strip_suffix('.'))
            .map(|stem| (stem, vec![*kind]))
    });
    let (stem, kinds) =
        known.unwrap_or_else(|| (name.strip_suffix(".service").unwrap_or(name), QuadletKind::ALL.to_vec()));
    // What systemd allows in unit names (VALID_CHARS_WITH_AT), but no backslash: no user chooses such names.
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '@');
    // “-activator.service” and a type still have to fit into a name of 255 bytes.
    if stem.is_empty() || stem.len() > 200 || !stem.chars().all(fits) || stem.starts_with('.') {
        return usage(format!(
            "“{}” cannot be the name of a quadlet: give it as in NAME.container",
            name.escape_debug()
        ));
    }
    if stem.matches('@').count() > 1 || stem.starts_with('@') {
        return usage(format!("“{stem}” cannot be the name of a unit: write NAME@INSTANCE"));
    }
    if let Some(template) = stem.strip_suffix('@') {
        return usage(format!(
            "“{stem}” is a template: say which instance is meant, for example {template}@one"
        ));
    }
    Ok((stem.to_owned(), kinds))
}

fn not_found(stem: &str, kinds: &[QuadletKind], directories: &[PathBuf]) -> Failure {
    // A template of that name is the likeliest mistake.
    if !stem.contains('@')
        && let Some(kind) = kinds.iter().find(|kind| {
            search::file(directories, &format!("{stem}@"), **kind).is_ok_and(|found| found.is_some())
        })
    {
        return Failure::NotFound(format!(
            "{stem}@.{} is a template: say which instance is meant, for example {stem}@one",
            kind.extension()
        ));
    }
    let what = match kinds {
        [one] => format!("{stem}.{}", one.extension()),
        _ => format!("{stem}.container (nor .pod, nor .kube)"),
    };
    let places: Vec<String> = directories.iter().map(|directory| directory.display().to_string()).collect();
    Failure::NotFound(format!("there is no {what} in {}", places.join(", ")))
}

/// The unit that the generator makes.
pub(crate) fn unit(stem: &str, kind: QuadletKind, file: &UnitFile, path: &Path) -> Result<String, Failure> {
    if let Some(name) = value(file, kind, "ServiceName") {
        if stem.contains('@') {
            return Err(Failure::Usage(format!(
                "{} is a template with ServiceName=, so its instances have one name; remove ServiceName=",
                path.display()
            )));
        }
        if name.contains('%') {
            return Err(Failure::Usage(format!(
                "ServiceName={name} in {} holds a specifier",
                path.display()
            )));
        }
        return Ok(format!("{}.service", name.strip_suffix(".service").unwrap_or(name)));
    }
    match kind {
        QuadletKind::Pod if stem.contains('@') => Err(Failure::Usage(format!(
            "{} is a template of pods: which containers its instances get is not known; use one .pod file for each",
            path.display()
        ))),
        QuadletKind::Pod => Ok(format!("{stem}-pod.service")),
        QuadletKind::Container | QuadletKind::Kube => Ok(format!("{stem}.service")),
    }
}

/// The container with the namespace in which the service listens; else why bro cannot know it.
pub(crate) fn container(
    stem: &str,
    kind: QuadletKind,
    file: &UnitFile,
    unit: &str,
    owner: Option<&RunAsUser>,
) -> Result<String, String> {
    match kind {
        QuadletKind::Container => {
            let name = value(file, kind, "ContainerName");
            let name = name.unwrap_or(if stem.contains('@') { "systemd-%p_%i" } else { "systemd-%N" });
            specifiers::expand(name, unit, owner).map_err(|bad| {
                format!("ContainerName={name} holds the specifier {bad}, which bro does not know; give --container")
            })
        }
        // All of a pod's containers share the namespace that its infra container holds.
        QuadletKind::Pod => match value(file, kind, "PodName") {
            Some(name) if name.contains('%') => Err(format!(
                "PodName={name} holds a specifier; give --container NAME of one of its containers"
            )),
            Some(name) => Ok(format!("{name}-infra")),
            None => Ok(format!("systemd-{stem}-infra")),
        },
        QuadletKind::Kube => {
            Err("the containers of a .kube get their names from the Kubernetes file, as POD-CONTAINER \
                           (`podman ps` shows them once it runs); give one of those in the pod as --container"
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(stem: &str, kind: QuadletKind, text: &str) -> (String, Result<String, String>) {
        let file = UnitFile::parse(text);
        let unit = unit(stem, kind, &file, Path::new("x")).unwrap();
        let container = container(stem, kind, &file, &unit, None);
        (unit, container)
    }

    // As Podman 5.4.2's generator answered for the same files.
    #[test]
    fn names_are_the_generators() {
        let name = |stem, kind, text| {
            let (unit, container) = names(stem, kind, text);
            (unit, container.unwrap_or_default())
        };
        let is = |unit: &str, container: &str| (unit.to_owned(), container.to_owned());
        assert_eq!(name("web", QuadletKind::Container, "[Container]\n"), is("web.service", "systemd-web"));
        assert_eq!(
            name("web", QuadletKind::Container, "[Container]\nContainerName=x\n"),
            is("web.service", "x")
        );
        assert_eq!(
            name("sn", QuadletKind::Container, "[Container]\nServiceName=nameless\nContainerName=cn-%N\n"),
            is("nameless.service", "cn-nameless")
        );
        assert_eq!(
            name("tpl@blue", QuadletKind::Container, "[Container]\n"),
            is("tpl@blue.service", "systemd-tpl_blue")
        );
        assert_eq!(name("p", QuadletKind::Pod, "[Pod]\n"), is("p-pod.service", "systemd-p-infra"));
        assert_eq!(
            name("p2", QuadletKind::Pod, "[Pod]\nServiceName=ppp\nPodName=mypod\n"),
            is("ppp.service", "mypod-infra")
        );
        // Quotes around one value are no part of it.
        assert_eq!(
            name("q", QuadletKind::Container, "[Container]\nServiceName=\"quoted\"\nContainerName=\"web\"\n"),
            is("quoted.service", "web")
        );
        assert_eq!(
            name("q", QuadletKind::Pod, "[Pod]\nPodName=\"mypod\"\n"),
            is("q-pod.service", "mypod-infra")
        );
        assert_eq!(name("q", QuadletKind::Container, "[Container]\nContainerName=\"\"\n").1, "systemd-q");
        assert_eq!(name("q", QuadletKind::Container, "[Container]\nContainerName=\"odd\n").1, "\"odd");
        assert_eq!(name("k", QuadletKind::Kube, "[Kube]\n"), is("k.service", ""));
    }

    #[test]
    fn refuses_names_that_are_none() {
        let refused = |name: &str| parse_name(name).unwrap_err().to_string();
        assert!(refused("").contains("cannot be the name"));
        assert!(refused("../etc/passwd").contains("cannot be the name"));
        assert!(refused("a b").contains("cannot be the name"));
        assert!(refused("data.volume").contains("no service"));
        assert!(refused("web@").contains("template"));
        assert!(refused("a@b@c").contains("NAME@INSTANCE"));
        assert!(refused(&"x".repeat(300)).contains("cannot be the name"));
        assert_eq!(parse_name("web.container").unwrap(), ("web".into(), vec![QuadletKind::Container]));
        assert_eq!(parse_name("web@blue").unwrap().0, "web@blue");
        assert_eq!(parse_name("web.service").unwrap().1.len(), 3);
    }

    #[test]
    fn nginx_is_recognised() {
        let nginx = |text: &str| Quadlet {
            name: "web".into(),
            kind: QuadletKind::Container,
            path: "web.container".into(),
            file: UnitFile::parse(text),
            unit: "web.service".into(),
            container: Ok("systemd-web".into()),
        };
        assert!(nginx("[Container]\nImage=docker.io/library/nginx:1.27\n").is_nginx());
        assert!(nginx("[Container]\nImage=ghcr.io/nginxinc/nginx-unprivileged\n").is_nginx());
        assert!(nginx("[Container]\nRootfs=/:O\nExec=/usr/sbin/nginx -g 'daemon off;'\n").is_nginx());
        assert!(!nginx("[Container]\nImage=ghcr.io/nginx/echo:nginx\nExec=echo nginx\n").is_nginx());
    }
}
