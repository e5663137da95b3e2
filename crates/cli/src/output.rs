//! What goes to stdout and stderr, and how quantities are written.

use std::error::Error;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// Whoever reads stdout has closed it; nobody needs to be told.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub(crate) struct StdoutClosed;

/// Writes `text` to stdout and flushes it.
///
/// # Errors
///
/// [`StdoutClosed`] on a broken pipe.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| {
        match error.kind() {
            io::ErrorKind::BrokenPipe => StdoutClosed.into(),
            _ => anyhow::Error::new(error).context("standard output"),
        }
    })
}

/// Prints one JSON document.
pub(crate) fn print_json(document: &impl Serialize) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(document)?))
}

/// Prints a line to stderr. A closed stderr is nobody's error.
pub(crate) fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints an error, causes included, as one line.
pub(crate) fn report(error: &anyhow::Error) {
    note(&format!("transom: {}", one_line(error.as_ref())));
}

/// The messages of an error and its causes. Some messages already end with
/// that of their cause; nothing is said twice.
fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !line.ends_with(&message) {
            line = format!("{line}: {message}");
        }
        cause = error.source();
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `1234567` as `1.23 MB`; units of 1000.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1e3;
    let mut unit = 0;
    // 999.95 would be written as 1000.0.
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1e3;
        unit += 1;
    }
    match value {
        v if v < 9.995 => format!("{v:.2} {}", units[unit]),
        v => format!("{v:.1} {}", units[unit]),
    }
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are ASCII"))
        .collect();
    groups.join(",")
}

/// Seconds as `850 ms`, `12.3 s` or `4 min 05 s`.
pub(crate) fn seconds(s: f64) -> String {
    match s {
        s if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        s if s < 99.95 => format!("{s:.1} s"),
        s => format!("{} min {:02} s", s.round() as u64 / 60, s.round() as u64 % 60),
    }
}

/// At most `max_chars` characters of `text`: its beginning.
pub(crate) fn keep_start(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    text.chars().take(max_chars.saturating_sub(1)).chain(['…']).collect()
}

/// At most `max_chars` characters of `text`: its end, which says more of the
/// name of a tensor.
pub(crate) fn keep_end(text: &str, max_chars: usize) -> String {
    let n = text.chars().count();
    if n <= max_chars {
        return text.to_owned();
    }
    ['…'].into_iter().chain(text.chars().skip(n + 1 - max_chars)).collect()
}

/// Text that takes one line of a terminal and moves nothing on it.
pub(crate) fn flatten(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Styles for text on stdout: nothing unless it is a terminal that wants them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    enabled: bool,
}

impl Style {
    /// Styles for stdout.
    pub(crate) fn stdout() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { enabled: wanted && io::stdout().is_terminal() }
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.enabled { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A heading or a result.
    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// Something of lesser interest.
    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Good news.
    pub(crate) fn good(self, text: &str) -> String {
        self.wrap("1;32", text)
    }

    /// Bad news.
    pub(crate) fn bad(self, text: &str) -> String {
        self.wrap("1;31", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_well_at_the_borders_of_their_units() {
        let cases = [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB")];
        let more = [(9_996, "10.0 kB"), (999_949, "999.9 kB"), (999_950, "1.00 MB")];
        for (n, text) in cases.into_iter().chain(more).chain([(u64::MAX, "18.4 EB")]) {
            assert_eq!(bytes(n), text);
        }
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.0421, 0.9996, 99.96].map(seconds), ["42 ms", "1.0 s", "1 min 40 s"]);
    }

    #[test]
    fn shortened_text_has_the_length_asked_for() {
        assert_eq!(keep_start("abc", 3) + &keep_end("abc", 3), "abcabc");
        assert_eq!(keep_start("äbcd", 3) + &keep_end("abcö", 3), "äb……cö");
        assert_eq!(flatten("a\n\x1b[2Jb"), "a  [2Jb");
    }

    #[test]
    fn causes_are_told_once_and_on_one_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("tensor `x`: {source}")]
        struct Outer {
            source: io::Error,
        }
        let error = anyhow::Error::new(Outer { source: io::Error::other("no\nspace") })
            .context("model.safetensors");
        assert_eq!(one_line(error.as_ref()), "model.safetensors: tensor `x`: no space");
    }
}
