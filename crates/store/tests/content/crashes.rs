//! Processes that are killed, machines that lose power, files that somebody has damaged.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Stdio,
    time::Duration,
};

use murmur_store::{Content, Contents, GROUP_BYTES};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{ALL, again, assert_right, fetch, folder_of_child, groups, noise, source, target};

/// Fetches what is missing, a few groups at a time, makes some of it durable and gives some of it up, and says so. `+7`: the seventh is kept.
fn fetch_and_tell(folder: &Path) {
    let tell = |text: String| std::io::stderr().write_all(text.as_bytes()).unwrap();
    let (source, mut dice) = (source(folder, BYTES), StdRng::seed_from_u64(u64::from(std::process::id())));
    let content = target(folder, &source);
    while let Some(missing) = content.missing(ALL).first() {
        let first = missing.start / GROUP_BYTES;
        let wanted = [groups(first..(first + 1 + dice.random_range(0..24)).min(missing.end.div_ceil(GROUP_BYTES)))];
        let mut encoded = Vec::new();
        source.encode(&wanted, &mut encoded).unwrap();
        let mut heard = |range: super::ByteRange| tell(format!("\n+{}\n", range.start / GROUP_BYTES));
        content.decode(&wanted, &mut encoded.as_slice(), &mut heard).unwrap();
        if dice.random_range(0..3) == 0 {
            content.flush().unwrap();
        }
        if cfg!(target_os = "linux") && dice.random_range(0..6) == 0 {
            let given_up = first + dice.random_range(0..3);
            tell(format!("\n-{given_up}\n"));
            content.forget(&[groups(given_up..given_up + 1)]).unwrap();
        }
    }
}

const BYTES: u64 = 600 * GROUP_BYTES + 77;

#[test]
fn a_process_that_is_killed_at_any_moment_loses_nothing_that_it_had_verified() {
    const TEST: &str = "crashes::a_process_that_is_killed_at_any_moment_loses_nothing_that_it_had_verified";
    const KILLS: u64 = 150;
    if let Some(folder) = folder_of_child() {
        return fetch_and_tell(&folder);
    }
    let home = tempfile::tempdir().unwrap();
    let original = noise(BYTES);
    let digest = source(home.path(), BYTES).digest();
    let contents = Contents::at(&home.path().join("target"));
    let (mut kept, mut dice) = (BTreeSet::new(), StdRng::seed_from_u64(0));
    for kill in 0..KILLS {
        let mut child = again(TEST, home.path()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut lines_left: u64 = dice.random_range(0..60);
        let mut line = String::new();
        while said.read_line(&mut line).unwrap() > 0 {
            match (line.strip_suffix('\n'), line.trim_end().get(1..).and_then(|number| number.parse::<u64>().ok())) {
                (Some(full), Some(group)) if full.starts_with('+') => {
                    assert!(kept.insert(group), "group {group} was fetched again after kill {kill}");
                }
                (Some(full), Some(group)) if full.starts_with('-') => drop(kept.remove(&group)),
                (Some(other), _) => assert!(!other.contains("panicked"), "{other}"),
                _ => {}
            }
            line.clear();
            lines_left = lines_left.saturating_sub(1);
            if lines_left == 0 {
                std::thread::sleep(Duration::from_micros(dice.random_range(0..3000)));
                // What it has said until now is read all the same. It may have ended by itself.
                let _ = child.kill();
            }
        }
        child.wait().unwrap();
        // Otherwise the next child is the one to take stock.
        if kill % 3 == 0 {
            let Some(content) = contents.find(&digest).unwrap() else {
                assert!(kept.is_empty());
                continue;
            };
            assert_right(&content, &original);
            let held: BTreeSet<u64> =
                content.held().iter().flat_map(|r| r.start / GROUP_BYTES..r.end.div_ceil(GROUP_BYTES)).collect();
            assert!(kept.is_subset(&held), "kill {kill} lost {:?}", kept.difference(&held));
            if content.is_complete() {
                contents.remove(&digest).unwrap();
                kept.clear();
            }
        }
    }
    let leftovers = fs::read_dir(home.path().join("target/models/contents")).unwrap().count();
    assert!(leftovers <= 3, "the lock, the content, and what the last kill has left");
}

/// Files as a power cut may leave them: what was synced is there, of what came later each sector or none.
fn after_a_power_cut(synced: &[u8], later: &[u8], dice: &mut StdRng) -> Vec<u8> {
    let mut left = later.to_vec();
    left[..synced.len()].copy_from_slice(synced);
    left[synced.len()..].fill(0);
    for (left, later) in left.chunks_mut(4096).zip(later.chunks(4096)) {
        if dice.random_range(0..2) == 0 {
            left.copy_from_slice(later);
        }
    }
    left
}

#[test]
fn after_a_power_cut_what_was_synced_is_held_and_nothing_that_is_not_right() {
    const GROUPS: u64 = 400;
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), GROUPS * GROUP_BYTES);
    let content = target(home.path(), &source);
    let directory = content.path().parent().unwrap();
    let read = |file: &str| fs::read(directory.join(file)).unwrap();
    let mut dice = StdRng::seed_from_u64(7);
    for cut in 0..24 {
        let start = dice.random_range(0..GROUPS - 20);
        fetch(&source, &content, &[groups(start..start + 5)]).unwrap();
        content.flush().unwrap();
        let (held, synced) = (content.held(), (read("model.gguf"), read("tree")));
        let start = dice.random_range(0..GROUPS - 20);
        fetch(&source, &content, &[groups(start..start + 1 + dice.random_range(0..20))]).unwrap();

        let after = home.path().join(format!("after-{cut}"));
        let place = after.join("models/contents").join(source.digest().to_string());
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("state"), read("state")).unwrap();
        fs::write(place.join("model.gguf"), after_a_power_cut(&synced.0, &read("model.gguf"), &mut dice)).unwrap();
        fs::write(place.join("tree"), after_a_power_cut(&synced.1, &read("tree"), &mut dice)).unwrap();
        let survivor = Contents::at(&after).find(&source.digest()).unwrap().unwrap();
        assert_right(&survivor, &noise(source.bytes()));
        assert!(survivor.missing(&held).is_empty(), "cut {cut} lost something that was synced");
        fetch(&source, &survivor, &survivor.missing(ALL)).unwrap();
        assert!(fs::read(survivor.path()).unwrap() == noise(source.bytes()));
    }
}

/// A content of which some groups are held, closed again, and the directory it lies in.
fn closed(home: &Path, source: &Content) -> std::path::PathBuf {
    let content = target(home, source);
    fetch(source, &content, &[groups(0..9), groups(20..30)]).unwrap();
    content.path().parent().unwrap().to_owned()
}

#[test]
fn a_damaged_state_is_made_anew_from_the_bytes_and_the_tree() {
    type Damage = fn(Vec<u8>) -> Option<Vec<u8>>;
    let damages: [Damage; 5] = [
        |_| None,
        |_| Some(Vec::new()),
        |state| Some(state[..state.len() / 2].to_vec()),
        |_| Some(b"{}\n".repeat(100)),
        // Claims more than is there.
        |state| Some(String::from_utf8(state).unwrap().replace("[0,9]", "[0,19]").into_bytes()),
    ];
    for damage in damages {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), 50 * GROUP_BYTES);
        let state = closed(home.path(), &source).join("state");
        match damage(fs::read(&state).unwrap()) {
            Some(damaged) => fs::write(&state, damaged).unwrap(),
            None => fs::remove_file(&state).unwrap(),
        }
        let content = Contents::at(&home.path().join("target")).find(&source.digest()).unwrap().unwrap();
        assert_eq!(content.held(), [groups(0..9), groups(20..30)]);
        fetch(&source, &content, ALL).unwrap();
        assert_right(&content, &noise(source.bytes()));
    }
}

#[test]
fn a_state_of_a_newer_murmur_is_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 50 * GROUP_BYTES);
    let state = closed(home.path(), &source).join("state");
    let newer = r#"{"version":99,"held":"?"}"#;
    let newer = format!("{newer}\n{}\n", blake3::hash(newer.as_bytes()));
    fs::write(&state, &newer).unwrap();
    let contents = Contents::at(&home.path().join("target"));
    let error = contents.find(&source.digest()).unwrap_err();
    assert!(error.to_string().contains("newer murmur"), "{error}");
    assert!(contents.create(source.digest(), source.bytes()).is_err());
    assert!(contents.list().unwrap().is_empty());
    assert_eq!(fs::read_to_string(&state).unwrap(), newer);
}

#[test]
fn a_damaged_tree_or_file_serves_nothing_wrong_and_is_fetched_again() {
    let flip = |path: &Path, at: usize| {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let damages: [&dyn Fn(&Path); 6] = [
        &|directory| fs::remove_file(directory.join("tree")).unwrap(),
        &|directory| fs::write(directory.join("tree"), "").unwrap(),
        &|directory| flip(&directory.join("tree"), 5),
        &|directory| flip(&directory.join("model.gguf"), 5),
        &|directory| fs::write(directory.join("model.gguf"), &noise(50 * GROUP_BYTES)[..100_000]).unwrap(),
        &|directory| fs::write(directory.join("model.gguf"), "").unwrap(),
    ];
    for (n, damage) in damages.iter().enumerate() {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), 50 * GROUP_BYTES);
        damage(&closed(home.path(), &source));
        let content = target(home.path(), &source);
        // What is damaged is noticed when it is to be sent, and then not held any more.
        while let Some(&held) = content.held().first() {
            let mut sent = Vec::new();
            match content.encode(&[held], &mut sent) {
                Ok(()) => break,
                Err(error) => assert!(error.to_string().contains("is damaged at byte"), "{n}: {error}"),
            }
        }
        fetch(&source, &content, ALL).unwrap();
        assert!(content.is_complete(), "{n}");
        assert!(fs::read(content.path()).unwrap() == noise(source.bytes()), "{n}");
    }
}
