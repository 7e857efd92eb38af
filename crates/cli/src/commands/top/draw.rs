//! A look on a screen of any size.

use std::collections::VecDeque;

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Block, Paragraph, Row, Sparkline, Table as Grid},
};

use super::look::{Look, Said, Table};
use crate::ui;

/// Rows of the picture of tokens per second.
const PICTURE_ROWS: u16 = 3;
/// A screen of fewer rows has better uses for them than the picture, and what there is to say of guesses.
const PICTURE_ROWS_MIN: u16 = 20;
/// Of so many rows of the screen one at most is about guesses.
const ROWS_OF_GUESSES: u16 = 4;
/// A table with its frame, its headings and one row.
const TABLE_ROWS_MIN: u16 = 4;
/// Frame and headings of a table.
const TABLE_ROWS_AROUND: u16 = 3;
/// Columns between two columns of a table.
const SPACING: u16 = 2;

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// Of the server.
    pub(super) address: String,
    /// The last that the server said.
    pub(super) said: Option<Said>,
    /// Tokens per second, one per look, the newest first.
    pub(super) history: VecDeque<u64>,
    /// Why there is nothing newer.
    pub(super) trouble: Option<String>,
}

pub(super) fn draw(frame: &mut Frame, shown: &Shown) {
    let Some(said) = &shown.said else {
        let waiting = shown.trouble.as_deref().unwrap_or("asking the server");
        let rows = Layout::vertical([Constraint::Min(1), Constraint::Length(1)]).split(frame.area());
        frame.render_widget(Paragraph::new(line(waiting)).wrap(Default::default()), rows[0]);
        frame.render_widget(footer(None), rows[1]);
        return;
    };
    let look = Look::of(said);
    let (activity, guesses) = (look.activity(), look.guesses());
    let height = frame.area().height;
    let (picture, guess_rows) =
        if height >= PICTURE_ROWS_MIN { (PICTURE_ROWS, height / ROWS_OF_GUESSES) } else { (0, 0) };
    let [head, figures, picture, tables, below, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::try_from(activity.len()).unwrap_or(1)),
        Constraint::Length(picture),
        Constraint::Min(0),
        Constraint::Length(u16::try_from(guesses.len()).unwrap_or(guess_rows).min(guess_rows)),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    // What is no longer true is shown as such.
    let base = if shown.trouble.is_some() { Style::new().add_modifier(Modifier::DIM) } else { Style::new() };
    frame.render_widget(Paragraph::new(line(&look.headline(&shown.address))).style(base.bold()), head);
    frame.render_widget(Paragraph::new(lines(&activity)).style(base), figures);
    frame.render_widget(Sparkline::default().data(&shown.history).style(base.fg(Color::Cyan)), picture);
    let all = look.tables();
    for (table, area) in all.iter().zip(shares(&all, tables)) {
        draw_table(frame, table, area, base);
    }
    frame.render_widget(Paragraph::new(lines(&guesses)).style(base), below);
    frame.render_widget(footer(shown.trouble.as_deref()), foot);
}

fn footer(trouble: Option<&str>) -> Paragraph<'static> {
    match trouble {
        Some(trouble) => Paragraph::new(line(trouble)).style(Style::new().fg(Color::Red)),
        None => Paragraph::new("q leaves").style(Style::new().add_modifier(Modifier::DIM)),
    }
}

/// The rows of each table: as many as it has, and where the screen is too small the longest one gives way first.
fn shares(tables: &[Table], area: Rect) -> Vec<Rect> {
    let wanted =
        |table: &Table| u16::try_from(table.rows.len().max(1)).unwrap_or(u16::MAX).saturating_add(TABLE_ROWS_AROUND);
    let mut rows: Vec<u16> = tables.iter().map(wanted).map(|rows| rows.min(area.height.max(TABLE_ROWS_MIN))).collect();
    while rows.iter().map(|&rows| u32::from(rows)).sum::<u32>() > u32::from(area.height) {
        match rows.iter_mut().filter(|rows| **rows > TABLE_ROWS_MIN).max() {
            Some(longest) => *longest -= 1,
            None => break,
        }
    }
    Layout::vertical(rows.into_iter().map(Constraint::Length)).split(area).to_vec()
}

fn draw_table(frame: &mut Frame, table: &Table, area: Rect, base: Style) {
    let room = usize::from(area.height.saturating_sub(TABLE_ROWS_AROUND));
    let visible = &table.rows[..table.rows.len().min(room)];
    let hidden = table.rows.len() - visible.len();
    let width = |column: usize| {
        let cells = visible.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        let widest = cells.chain([table.headings[column].len()]).max().unwrap_or(0);
        Constraint::Length(u16::try_from(widest).unwrap_or(u16::MAX))
    };
    let cell = |column: usize, text: &str| {
        let side = if table.right.contains(&column) { Alignment::Right } else { Alignment::Left };
        line(text).alignment(side).patch_style(colour(text))
    };
    let row = |cells: &mut dyn Iterator<Item = &str>| {
        Row::new(cells.enumerate().map(|(n, text)| cell(n, text)).collect::<Vec<_>>())
    };
    let rows = visible.iter().map(|cells| row(&mut cells.iter().map(String::as_str)));
    let mut block = Block::bordered().title(format!(" {} {} ", table.rows.len(), table.title)).border_style(base.dim());
    if hidden > 0 {
        block = block.title_bottom(format!(" and {hidden} more "));
    }
    let grid = Grid::new(rows, (0..table.headings.len()).map(width))
        .header(row(&mut table.headings.iter().copied()).style(base.dim()))
        .column_spacing(SPACING)
        .style(base)
        .block(block);
    frame.render_widget(grid, area);
}

/// The colour of what asks for attention.
fn colour(text: &str) -> Style {
    match text.split(' ').next() {
        Some("ready" | "direct") => Style::new().fg(Color::Green),
        Some("loading" | "restarting" | "draining" | "relayed" | "paused") => Style::new().fg(Color::Yellow),
        Some("failed" | "lost") => Style::new().fg(Color::Red),
        _ => Style::new(),
    }
}

fn lines(texts: &[String]) -> Vec<Line<'static>> {
    texts.iter().map(|text| line(text)).collect()
}

fn line(text: &str) -> Line<'static> {
    Line::from(ui::without_controls(text).replace(['\n', '\t'], " "))
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};
    use serde_json::{Value, json};

    use super::*;

    fn screen(shown: &Shown, (width, height): (u16, u16)) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, shown)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(row).collect()
    }

    /// Three stages: held by this node for whoever drives, by another one, and by a process of this driver's own.
    fn ring() -> Value {
        json!([
            {"layers": [0, 4], "node": "00112233445566778899", "process_id": null, "codec": "f32", "standby": null,
                "hop_us": 31_040, "last_step": {"compute_us": 2_100, "batch_rows": 1, "threads": 4}},
            {"layers": [4, 8], "node": "ff00112233445566", "process_id": null, "codec": "f16", "hop_us": null,
                "standby": {"node": "abcdef01234567", "computed_rows": 7},
                "last_step": {"compute_us": 12_340, "batch_rows": 8, "threads": 2}},
            {"layers": [8, 12], "node": null, "process_id": 77, "codec": null, "standby": null, "hop_us": 0,
                "last_step": null},
        ])
    }

    fn guessing() -> Value {
        json!({
            "by_model": true, "rows_per_frame": 1, "frames_in_flight": 24, "right": 0.85, "around_us": 62_000.0,
            "frame_us": 1_900.0, "token_us": 11_000.0, "plain_left": 0, "pays": true, "tokens_around": 3.21,
        })
    }

    fn at_work(peers: usize) -> Shown {
        let peer = |n: usize| {
            json!({
                "short": format!("{n:010}"), "role": "worker", "rtt_ms": 12.34, "since_s": 7_300,
                "path": if n == 0 { "direct 192.0.2.1:7" } else { "relayed https://relay.example/" },
                "models": [{"name": "tiny", "state": "ready", "running": 1}],
            })
        };
        let said = Said {
            status: json!({
                "version": "0.1.0",
                "mesh": {},
                "models": [
                    {"id": "tiny", "state": "ready", "context_tokens": 512, "details": {}},
                    {"id": "large", "state": "loading", "progress": 0.25, "context_tokens": 8192, "details": {}},
                    {"id": "theirs", "state": "ready", "context_tokens": 4096, "details": {"served_by": [
                        {"node": "abcdef01234567", "running": 1, "queued": 2, "decode_tokens_per_s": 40.0},
                    ]}},
                ],
                "node": {
                    "uptime_s": 90,
                    "tokens_per_s": {"api": 41.25, "nodes": 3.0},
                    "sharing": {"paused": "outside its hours (22:00-07:00)"},
                    "models": [
                        {"id": "tiny", "state": "ready", "requests_running": 2, "requests_queued": 0,
                            "decode_tokens_per_s": 81.0, "memory_bytes_planned": 3 << 20, "guessed_tokens": 60, "right_tokens": 29,
                            "guessed_by_depth": [20, 13, 7, 0], "right_by_depth": [18, 8, 3, 0], "rejected_us": 1_540_000,
                            "draft": {"model": "small", "node": "abcdef01234567"}, "guessing": guessing(), "stages": ring()},
                        {"id": "large", "state": "loading"},
                    ],
                    "requests": [
                        {"model": "tiny", "from": null, "at": null, "prompt_tokens": 900, "prompt_tokens_done": 256,
                            "generated_tokens": 0, "tokens_per_s": null, "age_ms": 1_500},
                        {"model": "theirs\u{1b}[31m", "from": "ff00112233445566", "at": "abcdef01234567",
                            "prompt_tokens": 5, "prompt_tokens_done": 5, "generated_tokens": 17, "tokens_per_s": 39.5,
                            "age_ms": 130_000},
                    ],
                },
            }),
            mesh: json!({
                "name": "home", "private": true, "node": "00112233445566778899",
                "peers": (0..peers).map(peer).collect::<Vec<_>>(),
            }),
        };
        Shown {
            address: "127.0.0.1:6876".into(),
            said: Some(said),
            history: VecDeque::from([44, 20, 0]),
            trouble: None,
        }
    }

    /// Rows without frames, each word after one blank.
    fn plain(screen: &[String]) -> Vec<String> {
        let words =
            |row: &String| row.replace('│', "").split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
        screen.iter().map(words).collect()
    }

    #[test]
    fn requests_models_nodes_and_rings_stand_in_tables_and_guesses_beneath() {
        let screen = screen(&at_work(2), (120, 36));
        assert_eq!(
            screen[..3],
            [
                "murmur 0.1.0 at http://127.0.0.1:6876, up 90.0 s; node 0011223344 in the private mesh home",
                "41.2 tokens/s for this machine, 3.0 for other nodes",
                "paused for other nodes: outside its hours (22:00-07:00)",
            ]
        );
        let rows = plain(&screen);
        for row in [
            "tiny this machine here 256/900 0 - 1.5 s",
            "theirs[31m ff00112233 abcdef0123 5 17 39.5 2 min",
            "tiny ready here 2 0 81.0 72 % by abcdef0123 512 3.0 MiB",
            "large loading 25 % here - - - - 8192 -",
            "theirs ready abcdef0123 1 2 40.0 - 4096 -",
            "0000000000 worker 12.3 ms direct 192.0.2.1:7 1 2 h tiny",
            "0000000001 worker 12.3 ms relayed https://relay.example/ 1 2 h tiny",
            "tiny 0..4 this node 2.1 ms 1 31.0 ms f32 -",
            "tiny 4..8 ff00112233 12.3 ms 8 - f16 abcdef0123",
            "tiny 8..12 this node - - 0.0 ms - -",
            "guesses for tiny, by small at abcdef0123: 72 % of 40 compared were right, by depth 90, 62, 43 %",
            "3.2 tokens for each way around; 1.5 s lost to wrong guesses at most",
            "0.85 right expected: a way around is 62.0 ms and a frame 1.9 ms, so 24 frames of 1 row; a token should take 11.0 ms",
            "q leaves",
        ] {
            assert!(rows.contains(&row.to_owned()), "no {row:?} in {rows:#?}");
        }
        assert!(screen.iter().any(|row| row.contains('█')), "no picture of the tokens per second: {screen:#?}");
    }

    #[test]
    fn a_stage_alone_is_a_ring_where_another_node_holds_it_and_guesses_that_are_left_alone_say_why() {
        let mut shown = at_work(0);
        let mut seen = |stage: Value, further: Value| {
            let said = shown.said.as_mut().unwrap();
            let model = &mut said.status["node"]["models"][0];
            model["stages"] = json!([stage]);
            for (key, value) in further.as_object().unwrap() {
                model["guessing"][key] = value.clone();
            }
            plain(&screen(&shown, (120, 36)))
        };
        let has = |rows: &[String], words: &str| rows.iter().any(|row| row.contains(words));
        let [here, elsewhere, _] = <[Value; 3]>::try_from(ring().as_array().unwrap().clone()).unwrap();
        let rows = seen(here, json!({"plain_left": 312, "pays": false, "by_model": false}));
        assert!(!has(&rows, "stages of rings"), "{rows:#?}");
        assert!(has(&rows, "guesses for tiny, looked up: 72 %"), "{rows:#?}");
        assert!(has(&rows, "left alone for 312 tokens: they cost time"), "{rows:#?}");
        let rows = seen(elsewhere, json!({"plain_left": 0, "tokens_around": null}));
        assert!(has(&rows, "tiny 4..8 ff00112233"), "{rows:#?}");
        assert!(has(&rows, "ways around not timed yet"), "{rows:#?}");
        assert!(has(&rows, "none at present: they would not pay"), "{rows:#?}");
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let rows = screen(&at_work(40), (110, 40));
        assert!(rows.iter().any(|row| row.contains(" 40 other nodes ")), "{rows:#?}");
        let hidden = rows.iter().find_map(|row| row.split("and ").nth(1)?.split(" more").next()?.parse::<usize>().ok());
        let visible = rows.iter().filter(|row| row.contains("worker")).count();
        assert_eq!(hidden.unwrap() + visible, 40, "{rows:#?}");
    }

    #[test]
    fn every_size_of_screen_is_drawn() {
        let mut lost = at_work(40);
        for width in [1, 2, 20, 300] {
            for height in [1, 2, 5, 12, 60] {
                screen(&lost, (width, height));
                screen(&Shown::default(), (width, height));
            }
        }
        lost.trouble = Some("no murmur server at 127.0.0.1:6876; trying again".into());
        let rows = screen(&lost, (110, 30));
        assert_eq!(rows[29], "no murmur server at 127.0.0.1:6876; trying again");
        assert!(rows.iter().any(|row| row.contains("tiny")), "the last that was known is gone: {rows:#?}");
    }
}
