//! Where in a file something stands, for error lines that name file, line, column and key.
//!
//! TOML's own spans say where a table begins; where a key of it stands is found by looking at the lines that follow.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A section of a file.
#[derive(Clone, Debug)]
pub(super) struct Place {
    file: PathBuf,
    text: Arc<str>,
    /// As people write it: `[daemon]`, `[[disk]]`.
    section: String,
    /// Where it starts, in bytes.
    start: usize,
}

impl Place {
    pub(super) fn new(file: &Path, text: &str, section: &str, start: usize) -> Place {
        Place { file: file.to_owned(), text: Arc::from(text), section: section.to_owned(), start }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// File, line and section.
    pub(super) fn section(&self) -> impl fmt::Display {
        let (line, column) = line_and_column(&self.text, self.start);
        format!("{}:{line}:{column}: {}", self.file.display(), self.section)
    }

    /// File and line.
    pub(super) fn short(&self) -> impl fmt::Display {
        format!("{}:{}", self.file.display(), line_and_column(&self.text, self.start).0)
    }

    /// File, line and column of the value, section and key.
    pub(super) fn key(&self, key: &str) -> impl fmt::Display {
        let at = self.value_of(key).unwrap_or(self.start);
        let (line, column) = line_and_column(&self.text, at);
        format!("{}:{line}:{column}: {} {key}", self.file.display(), self.section)
    }

    /// Where the value of `key` stands: after the first `key =` line before the next section of the same kind.
    fn value_of(&self, key: &str) -> Option<usize> {
        let mut at = self.start;
        for (index, line) in self.text.get(self.start..)?.split_inclusive('\n').enumerate() {
            if index > 0 && line.trim_start().starts_with(&self.section) {
                return None;
            }
            if let Some((before, after)) = line.split_once('=')
                && before.trim() == key
            {
                return Some(at + before.len() + 1 + (after.len() - after.trim_start().len()));
            }
            at += line.len();
        }
        None
    }
}

/// A line for an error of the TOML parser, or of a value that it handed on.
pub(super) fn toml_error(file: &Path, text: &str, error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', ", ");
    let Some(span) = error.span() else { return format!("{}: {message}", file.display()) };
    let (line, column) = line_and_column(text, span.start);
    match key_at(text, span.start) {
        Some(key) => format!("{}:{line}:{column}: {key}: {message}", file.display()),
        None => format!("{}:{line}:{column}: {message}", file.display()),
    }
}

fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The section and key that the byte `at` belongs to.
fn key_at(text: &str, at: usize) -> Option<String> {
    let line_end = text.get(at..)?.find('\n').map_or(text.len(), |newline| at + newline);
    let mut key = None;
    // A value may go over several lines, but a line that begins like a key is none of its.
    let mut may_go_on = true;
    for line in text[..line_end].lines().rev() {
        let line = line.trim();
        if line.starts_with('[') {
            let section = line.split('#').next().unwrap_or(line).trim();
            return Some(key.map_or(section.to_owned(), |key| format!("{section} {key}")));
        }
        if may_go_on && line.starts_with(|c: char| c.is_ascii_alphabetic()) {
            key = line.split_once('=').map(|(key, _)| key.trim());
            may_go_on = false;
        }
    }
    key.map(str::to_owned)
}
