//! What people have signed of a content: kept as it is, through crashes and beside others who write, for as long as the content is here.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::Stdio,
};

use murmur_store::{Contents, GROUP_BYTES, StoreError};

use super::{ALL, again, fetch, folder_of_child, groups, source, target};

const BYTES: u64 = 3 * GROUP_BYTES + 5;

#[test]
fn what_was_signed_is_kept_as_it_is_and_seen_by_every_handle() {
    let home = tempfile::tempdir().unwrap();
    let content = source(home.path(), BYTES);
    assert!(content.signatures().unwrap().is_empty());
    let signed = vec![vec![0, 255, 10], Vec::new(), b"{\"}\n".to_vec()];
    content.change_signatures(|known| [known, signed.clone()].concat()).unwrap();
    assert_eq!(content.signatures().unwrap(), signed);
    drop(content);
    assert_eq!(source(home.path(), BYTES).signatures().unwrap(), signed);
}

#[test]
fn what_was_signed_of_a_part_stays_when_the_whole_file_is_adopted_and_when_its_length_was_a_false_claim() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), BYTES);
    let target_dir = home.path().join("target");
    let claimed = Contents::at(&target_dir).create(source.digest(), BYTES + 1).unwrap();
    claimed.change_signatures(|_| vec![b"word".to_vec()]).unwrap();
    drop(claimed);
    let part = target(home.path(), &source);
    assert_eq!((part.bytes(), part.signatures().unwrap()), (BYTES, vec![b"word".to_vec()]));
    fetch(&source, &part, &[groups(0..1)]).unwrap();
    part.flush().unwrap();
    drop(part);
    let whole = Contents::at(&target_dir).adopt(&home.path().join("original.gguf"), &mut |_, _| ()).unwrap();
    assert!(whole.is_complete() && whole.is_reference());
    assert_eq!(whole.signatures().unwrap(), [b"word"]);
}

#[test]
fn what_was_signed_goes_with_the_content() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), BYTES);
    let content = target(home.path(), &source);
    fetch(&source, &content, ALL).unwrap();
    content.change_signatures(|_| vec![b"word".to_vec()]).unwrap();
    Contents::at(&home.path().join("target")).remove(&content.digest()).unwrap();
    let gone = content.change_signatures(|_| vec![b"late".to_vec()]).unwrap_err();
    assert!(matches!(gone, StoreError::ContentGone { .. }), "{gone}");
    assert!(target(home.path(), &source).signatures().unwrap().is_empty());
}

#[test]
fn what_was_damaged_on_disk_counts_as_not_signed_and_can_be_signed_again() {
    let home = tempfile::tempdir().unwrap();
    let content = source(home.path(), BYTES);
    content.change_signatures(|_| vec![b"word".to_vec()]).unwrap();
    let directory = home.path().join("source/models/contents").join(content.digest().to_string());
    let file = directory.join("signatures");
    let right = fs::read(&file).unwrap();
    for at in 0..right.len() {
        let mut damaged = right.clone();
        damaged[at] ^= 1;
        fs::write(&file, damaged).unwrap();
        assert!(content.signatures().unwrap().is_empty(), "{at}");
    }
    fs::write(&file, vec![b'x'; 2 << 20]).unwrap();
    assert!(content.signatures().unwrap().is_empty());
    content.change_signatures(|known| [known, vec![b"again".to_vec()]].concat()).unwrap();
    assert_eq!(content.signatures().unwrap(), [b"again"]);
}

#[test]
fn processes_that_sign_at_once_and_are_killed_lose_nothing_that_was_said_to_be_kept() {
    const TEST: &str = "signatures::processes_that_sign_at_once_and_are_killed_lose_nothing_that_was_said_to_be_kept";
    const PROCESSES: usize = 2;
    const ROUNDS: usize = 8;
    let one_more = |mut known: Vec<Vec<u8>>| {
        known.push(vec![known.len() as u8; 40]);
        known
    };
    if let Some(folder) = folder_of_child() {
        let content = source(&folder, BYTES);
        loop {
            content.change_signatures(one_more).unwrap();
            std::io::stderr().write_all(b"\n+\n").unwrap();
        }
    }
    let home = tempfile::tempdir().unwrap();
    let content = source(home.path(), BYTES);
    for round in 0..ROUNDS {
        let before = content.signatures().unwrap().len();
        let children = std::array::from_fn::<_, PROCESSES, _>(|_| {
            let mut child = again(TEST, home.path()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
            let said = BufReader::new(child.stderr.take().unwrap());
            (child, said)
        });
        let mut kept = 0;
        for (mut child, mut said) in children {
            let (mut line, mut seen) = (String::new(), 0);
            while seen <= round && said.read_line(&mut line).unwrap() > 0 {
                seen += usize::from(line == "+\n");
                line.clear();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            // What it had said and was not read yet.
            kept += seen + said.lines().filter(|line| line.as_ref().is_ok_and(|line| line == "+")).count();
        }
        let known = content.signatures().unwrap();
        // One that was killed may have kept what it did not come to say.
        assert!((kept..=kept + PROCESSES).contains(&(known.len() - before)), "{kept}, {}", known.len() - before);
        assert!(known.iter().enumerate().all(|(at, signed)| *signed == vec![at as u8; 40]), "one was lost or doubled");
    }
}
