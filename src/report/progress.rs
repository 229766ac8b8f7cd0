//! The progress bar on a terminal, and the pace of progress lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::engine::Progress;

/// One bar, redrawn for each disk in turn.
pub(super) struct Bar {
    bar: ProgressBar,
    disk: String,
}

impl Bar {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template(
            "{prefix} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} eta {eta}{msg}",
        )
        .expect("the template is well formed")
        .progress_chars("=> ");
        bar.set_style(style);
        Self {
            bar,
            disk: String::new(),
        }
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        if self.disk != progress.disk {
            self.disk.clone_from(&progress.disk);
            self.bar.reset();
            self.bar.set_prefix(super::text::printable(&progress.disk));
        }
        self.bar.set_length(progress.total_bytes);
        self.bar.set_position(progress.done_bytes);
        self.bar.set_message(format!(
            ", moved {}, new {}",
            HumanBytes(progress.moved_bytes),
            HumanBytes(progress.new_bytes)
        ));
    }

    pub(super) fn suspend(&self, write: impl FnOnce()) {
        self.bar.suspend(write);
    }

    pub(super) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Says when enough time has gone by since the last time.
pub(super) struct Pace {
    every: Duration,
    next: Option<Instant>,
}

impl Pace {
    pub(super) fn every(every: Duration) -> Self {
        Self { every, next: None }
    }

    pub(super) fn due(&mut self) -> bool {
        let now = Instant::now();
        match self.next {
            Some(next) if now < next => false,
            _ => {
                self.next = Some(now + self.every);
                true
            }
        }
    }
}
