//! Child processes whose every wait has a deadline, so that a hang fails its test instead of the whole run.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a single command may take; a slow machine needs a fraction of it.
const DEADLINE: Duration = Duration::from_secs(180);

/// A child with its output read as it comes; killed when dropped.
pub(crate) struct Process {
    child: Child,
    what: String,
    lines: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// What a child left behind.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Process {
    /// Starts `command` with its stdout and stderr captured.
    pub(crate) fn start(mut command: Command) -> Self {
        let what = format!("{command:?}");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{what}: {e}"));
        let stdout = child.stdout.take().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let mut line = Vec::new();
                match stdout.read_until(b'\n', &mut line) {
                    Ok(n) if n > 0 => {
                        if sender.send(line).is_err() {
                            return;
                        }
                    }
                    _ => return,
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            text
        });
        Self {
            child,
            what,
            lines,
            seen: Vec::new(),
            stderr: Some(stderr),
        }
    }

    /// The process's id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the next line of stdout, or none at its end.
    pub(crate) fn next_line(&mut self) -> Option<Vec<u8>> {
        self.line_before(Instant::now() + DEADLINE)
    }

    /// Writes to the child's stdin, which `command` must have made a pipe.
    pub(crate) fn write(&mut self, text: &str) {
        self.child
            .stdin
            .as_mut()
            .expect("stdin is a pipe")
            .write_all(text.as_bytes())
            .unwrap();
    }

    /// Sends a signal by name, such as `INT`.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    /// Kills the child if it has not closed its stdout after `after`; says whether it had to.
    pub(crate) fn kill_after(mut self, after: Duration) -> bool {
        let end = Instant::now() + after;
        loop {
            match self
                .lines
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.child.wait().unwrap();
                    return false;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.child.kill().unwrap();
                    self.child.wait().unwrap();
                    return true;
                }
            }
        }
    }

    /// Waits for the end and returns everything that was written.
    pub(crate) fn finish(mut self) -> Finished {
        let end = Instant::now() + DEADLINE;
        while self.line_before(end).is_some() {}
        let status = self.child.wait().unwrap();
        let stderr = self.stderr.take().unwrap().join().unwrap();
        Finished {
            status,
            stdout: std::mem::take(&mut self.seen),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    fn line_before(&mut self, end: Instant) -> Option<Vec<u8>> {
        match self
            .lines
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            Ok(line) => {
                self.seen.extend_from_slice(&line);
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill();
                let stderr = self
                    .stderr
                    .take()
                    .map(|t| t.join().unwrap())
                    .unwrap_or_default();
                panic!(
                    "{} hung; its stderr:\n{}",
                    self.what,
                    String::from_utf8_lossy(&stderr)
                );
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal by name to one process.
pub(crate) fn signal(id: u32, name: &str) {
    let status = Command::new("sh")
        .args(["-c", "kill -s \"$1\" \"$2\"", "sh", name])
        .arg(id.to_string())
        .status();
    assert!(status.unwrap().success(), "cannot send {name} to {id}");
}

/// Runs a peer's tool to its end and returns its stdout; a failure of the tool fails the test.
pub(crate) fn tool(name: &str, args: &[&str]) -> Vec<u8> {
    let run = try_tool(name, args);
    assert!(
        run.status.success(),
        "{name} {args:?}: {}\n{}{}",
        run.status,
        String::from_utf8_lossy(&run.stdout),
        run.stderr
    );
    run.stdout
}

/// Runs a peer's tool to its end, whatever that is.
pub(crate) fn try_tool(name: &str, args: &[&str]) -> Finished {
    let mut command = Command::new(name);
    command.args(args).stdin(Stdio::null());
    Process::start(command).finish()
}
