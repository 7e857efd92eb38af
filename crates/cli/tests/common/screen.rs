//! What a program shows in a terminal.

use std::{io::Read, os::fd::AsFd, sync::mpsc};

use super::PATIENCE;

/// What a terminal shows.
pub struct Screen {
    output: mpsc::Receiver<String>,
    pub shown: String,
}

impl Screen {
    pub fn of(terminal: &pty_process::blocking::Pty) -> Self {
        let mut terminal = std::fs::File::from(terminal.as_fd().try_clone_to_owned().unwrap());
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal that its program has left is an error to read.
            while let Ok(n @ 1..) = terminal.read(&mut buffer) {
                if sender.send(String::from_utf8_lossy(&buffer[..n]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Self { output, shown: String::new() }
    }

    /// Waits until `text` has been shown, and forgets everything up to it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        while !self.shown.contains(text) {
            match self.output.recv_timeout(PATIENCE) {
                Ok(more) => self.shown.push_str(&more),
                Err(error) => panic!("{text:?} was never shown ({error}), but {:?}", self.shown),
            }
        }
        let end = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..end);
    }
}
