//! Unit files and quadlets as text: systemd.syntax(7), as far as reading them needs it.

use std::path::Path;

/// The beginning of each file that `bro activate` writes. A file without it is not bro's.
pub const MARKER: &str = "# Written by bro activate";

/// One `KEY=VALUE`, in a section.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    section: String,
    key: String,
    value: String,
}

/// What a unit file says, in its own order. Several files (a quadlet and its drop-ins) may be read one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitFile {
    entries: Vec<Entry>,
    sections: Vec<String>,
}

impl UnitFile {
    /// Reads one file. Lines that are neither comment, section nor assignment are left out, as systemd does (with a warning).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut file = Self::default();
        file.read(text);
        file
    }

    /// Reads a further file on top: what it assigns comes later, so it wins, or adds where lists are meant.
    pub fn read(&mut self, text: &str) {
        let mut section = String::new();
        for line in logical_lines(text) {
            let line = line.trim();
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
                if !self.has_section(name) {
                    self.sections.push(section.clone());
                }
            } else if let Some((key, value)) = line.split_once('=')
                && !section.is_empty()
            {
                let (key, value) = (key.trim_end().to_owned(), value.trim_start().to_owned());
                self.entries.push(Entry { section: section.clone(), key, value });
            }
        }
    }

    /// Is there such a section, even if it is empty?
    #[must_use]
    pub fn has_section(&self, name: &str) -> bool {
        self.sections.iter().any(|section| section == name)
    }

    /// The value of a setting that has one: the last assignment. None when there is none, or it is empty.
    #[must_use]
    pub fn value(&self, section: &str, key: &str) -> Option<&str> {
        self.assigned(section, key).last().filter(|value| !value.is_empty())
    }

    /// The values of a setting that is a list: one per assignment; an empty one begins anew.
    #[must_use]
    pub fn values(&self, section: &str, key: &str) -> Vec<&str> {
        let mut values = Vec::new();
        for value in self.assigned(section, key) {
            if value.is_empty() {
                values.clear();
            } else {
                values.push(value);
            }
        }
        values
    }

    /// The words of a list, from all its assignments.
    #[must_use]
    pub fn words(&self, section: &str, key: &str) -> Vec<String> {
        self.values(section, key).into_iter().flat_map(split_words).collect()
    }

    /// A boolean as systemd reads it, if it is one.
    #[must_use]
    pub fn boolean(&self, section: &str, key: &str) -> Option<bool> {
        match self.value(section, key)?.to_ascii_lowercase().as_str() {
            "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
            "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
            _ => None,
        }
    }

    fn assigned<'a, 'b>(
        &'a self,
        section: &'b str,
        key: &'b str,
    ) -> impl Iterator<Item = &'a str> + use<'a, 'b> {
        let entries = self.entries.iter();
        entries
            .filter(move |entry| entry.section == section && entry.key == key)
            .map(|entry| entry.value.as_str())
    }
}

/// Lines with their continuations joined. Comments are left out, also between the parts of a continued line.
fn logical_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        if line.trim_start().starts_with(['#', ';']) {
            continue;
        }
        let (part, goes_on) = match line.strip_suffix('\\') {
            Some(part) => (part, true),
            None => (line, false),
        };
        let mut whole = open.take().map_or_else(String::new, |whole| whole + " ");
        whole.push_str(part);
        if goes_on {
            open = Some(whole);
        } else {
            lines.push(whole);
        }
    }
    lines.extend(open);
    lines
}

/// Splits a value at white space, with quotes and backslashes read as systemd does. An open quote runs to the end.
#[must_use]
pub fn split_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', _) => {
                let escaped = match chars.next() {
                    Some('n') => '\n',
                    Some('t') => '\t',
                    Some('s') => ' ',
                    Some(other) => other,
                    None => '\\',
                };
                word.get_or_insert_default().push(escaped);
            }
            (c, Some(open)) if c == open => quote = None,
            // systemd opens a quote only where a word begins; in the middle of one the character stands for itself.
            ('"' | '\'', None) if word.is_none() => {
                quote = Some(c);
                word = Some(String::new());
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Writes one word of a command line so that systemd reads back exactly that: `%` and `$` mean nothing, quotes where needed.
#[must_use]
pub fn quote_word(word: &str) -> String {
    let literal = word.replace('%', "%%").replace('$', "$$");
    let plain = |c: char| c.is_alphanumeric() || "-_=.:/,@+[]%${}*".contains(c);
    if !literal.is_empty() && literal.chars().all(plain) {
        return literal;
    }
    let mut quoted = String::from("\"");
    for c in literal.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Can `text` stand behind a `KEY=`, and is exactly that read back there?
pub(crate) fn holds(text: &str) -> bool {
    !text.contains(char::is_control) && !text.ends_with('\\')
}

/// The same for a path. One that is not UTF-8 would be read back as another.
pub(crate) fn holds_path(path: &Path) -> bool {
    path.to_str().is_some_and(holds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUADLET: &str = "\
# a comment
[Container]
Image = docker.io/library/nginx
Exec=nginx \\
# in the middle of a line
; and another
  -g 'daemon off;'
PublishPort=8080:80
PublishPort=
PublishPort=9090:80
nonsense
[Unit]
[Install]
WantedBy=default.target multi-user.target
";

    #[test]
    fn reads_comments_continuations_and_lists() {
        let file = UnitFile::parse(QUADLET);
        assert_eq!(file.value("Container", "Image"), Some("docker.io/library/nginx"));
        assert_eq!(file.words("Container", "Exec"), ["nginx", "-g", "daemon off;"]);
        assert_eq!(file.values("Container", "PublishPort"), ["9090:80"]);
        assert_eq!(file.words("Install", "WantedBy"), ["default.target", "multi-user.target"]);
        assert!(file.has_section("Unit") && !file.has_section("Service"));
        assert_eq!(file.value("Unit", "Description"), None);
    }

    #[test]
    fn a_drop_in_wins_or_empties() {
        let mut file = UnitFile::parse(QUADLET);
        file.read("[Container]\nImage=other\n[Install]\nWantedBy=\n");
        assert_eq!(file.value("Container", "Image"), Some("other"));
        assert!(file.words("Install", "WantedBy").is_empty());
    }

    #[test]
    fn words_are_split_as_systemd_does() {
        assert_eq!(split_words(r#""NGINX=3;" a\ b 'c "d"' e"f"#), ["NGINX=3;", "a b", "c \"d\"", "e\"f"]);
        assert_eq!(split_words("  "), Vec::<String>::new());
        assert_eq!(split_words("''"), [""]);
    }

    #[test]
    fn booleans_are_systemds() {
        let file = UnitFile::parse("[Q]\na=yes\nb=0\nc=perhaps\n");
        let read = |key| file.boolean("Q", key);
        assert_eq!((read("a"), read("b"), read("c"), read("d")), (Some(true), Some(false), None, None));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,60}") {
            drop(UnitFile::parse(&text));
        }

        #[test]
        fn what_is_quoted_is_read_back(words in prop::collection::vec("[ -~\\n\\täß]{0,12}", 0..5)) {
            let line: Vec<String> = words.iter().map(|word| quote_word(word)).collect();
            let read: Vec<String> =
                split_words(&line.join(" ")).iter().map(|word| word.replace("%%", "%").replace("$$", "$")).collect();
            prop_assert_eq!(read, words);
        }
    }
}
