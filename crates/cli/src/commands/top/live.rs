//! The screen: asks the server every second, and leaves the terminal as it was, whatever ends it.

use std::{
    io,
    time::{Duration, Instant},
};

use anyhow::Context;
use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use futures::StreamExt;
use ratatui::DefaultTerminal;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    draw::{Shown, draw},
    look::{Look, Said},
};
use crate::{client::ApiClient, commands::server::wait_for_stop};

/// How often the server is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A server that takes longer to answer does not answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Looks that are remembered for the picture: more columns than any terminal has.
const HISTORY_MAX: usize = 1024;

/// The terminal while it is ours. Dropped, it is the user's again; a panic gives it back, too, before it is told.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> io::Result<Self> {
        ratatui::try_init().map(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

pub(super) async fn run(client: &ApiClient) -> anyhow::Result<()> {
    let mut screen = Screen::open().context("taking over the terminal (--once does without)")?;
    let (sender, mut looks) = mpsc::channel(1);
    let mut shown = Shown { address: client.address().to_string(), ..Shown::default() };
    let mut lost_since = None;
    let (mut keys, stop) = (EventStream::new(), wait_for_stop());
    let looking = look_on(client, sender);
    tokio::pin!(looking, stop);
    loop {
        screen.0.draw(|frame| draw(frame, &shown)).context("drawing")?;
        tokio::select! {
            () = &mut looking => return Ok(()),
            () = &mut stop => return Ok(()),
            Some(look) = looks.recv() => note(&mut shown, &mut lost_since, look),
            key = keys.next() => match key {
                Some(Ok(Event::Key(key))) if leaves(key) => return Ok(()),
                // Anything else is a reason to draw again, a new size most of all.
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("reading from the terminal"),
                None => return Ok(()),
            },
        }
    }
}

/// Asks again and again, for as long as somebody listens.
async fn look_on(client: &ApiClient, out: mpsc::Sender<anyhow::Result<Said>>) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let silent = || anyhow::anyhow!("the server does not answer within {} s", PATIENCE.as_secs());
        let look = timeout(PATIENCE, Said::ask(client)).await.unwrap_or_else(|_| Err(silent()));
        if out.send(look).await.is_err() {
            return;
        }
    }
}

fn note(shown: &mut Shown, lost_since: &mut Option<Instant>, look: anyhow::Result<Said>) {
    match look {
        Ok(said) => {
            shown.history.push_front(Look::of(&said).tokens_per_s().round() as u64);
            shown.history.truncate(HISTORY_MAX);
            shown.said = Some(said);
            shown.trouble = None;
            *lost_since = None;
        }
        Err(error) => {
            let seconds = lost_since.get_or_insert_with(Instant::now).elapsed().as_secs();
            shown.trouble = Some(format!("trying again for {seconds} s (q leaves): {error:#}"));
        }
    }
}

fn leaves(key: KeyEvent) -> bool {
    let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release && (is_ctrl_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}
