//! Progress on stderr, when somebody is there to see it.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar or a spinner; invisible when stderr is no terminal or JSON is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar over bytes, with rate and time left; the work says how many.
    pub(crate) fn bytes(quiet: bool, what: &'static str) -> Self {
        let template = "{msg} [{bar:32}] {decimal_bytes}/{decimal_total_bytes}  \
                        {decimal_bytes_per_sec}  {eta} left";
        Self::with_template(quiet, what, 0, template)
    }

    /// A bar over things to be counted.
    pub(crate) fn count(quiet: bool, what: &'static str, total: u64) -> Self {
        Self::with_template(quiet, what, total, "{msg} [{bar:32}] {pos}/{len}  {eta} left")
    }

    fn with_template(quiet: bool, what: &'static str, total: u64, template: &str) -> Self {
        let bar =
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
        if quiet || !io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
            return Self(bar);
        }
        let style = ProgressStyle::with_template(template).expect("the template is a constant");
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    /// Counts.
    pub(crate) fn add(&self, n: u64) {
        self.0.inc(n);
    }

    /// Sets the count and its end, which may become known late.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

impl transom::checkpoint::Progress for Progress {
    fn start(&self, total_bytes: u64) {
        self.0.set_length(total_bytes);
    }

    fn advance(&self, n_bytes: u64) {
        self.0.inc(n_bytes);
    }
}
