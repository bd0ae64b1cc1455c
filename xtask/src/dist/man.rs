//! The man pages. What is written by hand is in packaging/man, one file a page, in the order of man-pages(7); a line of its own
//! says where something of the command line goes:
//!
//! | line | what takes its place |
//! |---|---|
//! | `@TITLE@` | the page's heading |
//! | `@NAME@`, `@SYNOPSIS@`, `@OPTIONS@`, `@COMMANDS@` | these sections, from clap |
//! | `@EXIT-STATUS@` | the section that all commands share |
//!
//! A command without a file gets a page of what clap knows.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use bro_user::cli;
use bro_user::cli::Cli;
use clap::CommandFactory as _;
use clap_mangen::Man;

use super::Release;

/// Commands are for administrators.
const COMMANDS: &str = "8";

/// The apostrophe, which the library calls by this name, in old and new roffs.
const TOP: &str = ".\\\" Made by cargo xtask dist.\n.ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

const DEFAULT: &str =
    "@TITLE@\n@NAME@\n@SYNOPSIS@\n@DESCRIPTION@\n@OPTIONS@\n@EXIT-STATUS@\n.SH SEE ALSO\n.BR bro (8)\n";

const EXIT_STATUS: &str = r#".SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
Failed.
.TP
.B 2
Wrong usage.
.TP
.B 3
No socket was passed.
.TP
.B 4
The container, process, namespace, quadlet or service was not found.
.TP
.B 5
Not permitted.
.PP
An error is one sentence on standard error that begins with
.RB \(lq "bro: " \(rq.
"#;

/// One page.
pub struct Page {
    /// `bro-forward.8`
    pub file: String,
    pub text: Vec<u8>,
}

impl Page {
    /// Where it is below a folder of man pages: `man8/bro-forward.8`.
    pub fn place(&self) -> String {
        let section = self.file.rsplit('.').next().unwrap_or_default();
        format!("man{section}/{}", self.file)
    }
}

/// All pages, sorted.
pub fn pages(release: &Release) -> Result<Vec<Page>> {
    let mut pages: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    let folder = release.packaging("man");
    for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a page's name")?.to_owned();
        sources.insert(name, std::fs::read_to_string(&path)?);
    }
    let mut bro = Cli::command().disable_help_subcommand(true);
    bro.build();
    let date = release.epoch.date("+%Y-%m-%d")?;
    let subcommands = bro.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let commands: Vec<clap::Command> = std::iter::once(bro.clone()).chain(subcommands).collect();
    for command in commands {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
        let file = format!("{name}.{COMMANDS}");
        let source = sources.remove(&file).unwrap_or_else(|| DEFAULT.to_owned());
        pages.insert(file, fill(&source, Some(command), &name, COMMANDS, &date)?);
    }
    for (name, of) in cli::NAMES {
        let link = format!(".so man{COMMANDS}/bro-{of}.{COMMANDS}\n");
        pages.entry(format!("{name}.{COMMANDS}")).or_insert(link.into());
    }
    for (file, source) in sources {
        let (name, section) = file.rsplit_once('.').context("a page's name ends in its section")?;
        let text = fill(&source, None, name, section, &date)?;
        pages.insert(file, text);
    }
    Ok(pages.into_iter().map(|(file, text)| Page { file, text }).collect())
}

fn fill(
    source: &str,
    command: Option<clap::Command>,
    name: &str,
    section: &str,
    date: &str,
) -> Result<Vec<u8>> {
    let man = command.map(|command| Man::new(command).section(section));
    let version = concat!("bro ", env!("CARGO_PKG_VERSION"));
    let mut text = String::from(TOP);
    for line in source.lines() {
        let part = |render: fn(&Man, &mut Vec<u8>) -> std::io::Result<()>| -> Result<String> {
            let man = man.as_ref().with_context(|| format!("{name}({section}) is no command: {line}"))?;
            let mut bytes = Vec::new();
            render(man, &mut bytes)?;
            Ok(tidy(&String::from_utf8(bytes)?))
        };
        let filled = match line {
            "@TITLE@" => {
                format!(
                    ".TH {} {section} {date} \"{version}\" bro\n",
                    name.to_uppercase().replace('-', "\\-")
                )
            }
            "@NAME@" => part(|man, out| man.render_name_section(out))?,
            "@SYNOPSIS@" => part(|man, out| man.render_synopsis_section(out))?,
            "@DESCRIPTION@" => part(|man, out| man.render_description_section(out))?,
            "@OPTIONS@" => part(|man, out| man.render_options_section(out))?,
            "@COMMANDS@" => part(|man, out| man.render_subcommands_section(out))?
                .replace(".SH SUBCOMMANDS", ".SH COMMANDS"),
            "@EXIT-STATUS@" => EXIT_STATUS.to_owned(),
            line => format!("{line}\n"),
        };
        text.push_str(&filled);
    }
    Ok(text.into_bytes())
}

/// Without the two lines that the library puts at the top of everything, and without blank lines, which man(7) discourages.
fn tidy(roff: &str) -> String {
    let mut text = String::new();
    for line in roff.lines().skip_while(|line| !line.starts_with(".SH")) {
        text.push_str(if line.is_empty() { ".sp" } else { line });
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::epoch::Epoch;

    fn all() -> BTreeMap<String, String> {
        let release = Release {
            source: crate::build::workspace(),
            out: std::path::PathBuf::new(),
            version: "0",
            revision: 1,
            epoch: Epoch(0),
        };
        let pages = pages(&release).unwrap();
        pages.into_iter().map(|page| (page.file, String::from_utf8(page.text).unwrap())).collect()
    }

    #[test]
    fn every_command_and_every_option_has_its_place() {
        let pages = all();
        let mut bro = Cli::command();
        bro.build();
        let top = &pages["bro.8"];
        for command in
            bro.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help")
        {
            let name = command.get_name();
            assert!(top.contains(&format!("bro\\-{name}(8)")), "bro(8) does not name {name}");
            let page = &pages[&format!("bro-{name}.8")];
            for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
                let shown = match (option.get_long(), option.get_value_names()) {
                    (Some(long), _) => format!("\\-\\-{}", long.replace('-', "\\-")),
                    (None, Some([value, ..])) => value.to_string(),
                    (None, _) => option.get_id().to_string(),
                };
                assert!(page.contains(&shown), "bro-{name}(8) does not explain {shown}");
            }
        }
    }

    #[test]
    fn every_page_has_the_usual_sections_and_nothing_unfilled() {
        for (file, page) in all() {
            if page.starts_with(".so ") {
                continue;
            }
            let unfilled = page.lines().find(|line| line.starts_with('@') && line.ends_with('@'));
            assert_eq!(unfilled, None, "{file}");
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"] {
                assert!(page.contains(&format!("\n.SH {section}\n")), "{file} has no {section}");
            }
            let command = file.ends_with(".8");
            assert!(!command || page.contains("\n.SH EXIT STATUS\n"), "{file} has no EXIT STATUS");
        }
    }
}
