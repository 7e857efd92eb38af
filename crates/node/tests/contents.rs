//! Files of models from nodes that lie, stall, flood and vanish: nothing false is kept, and what is right comes from whoever has it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]
#![allow(clippy::single_range_in_vec_init, reason = "a list of one stretch is meant")]

mod common;

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use common::{Claim, Pull, Rogue, Trick, World, until};
use murmur_api::backend::Backend;
use murmur_net::stream::{self, Reader};
use murmur_node::NodeOptions;
use murmur_protocol::mesh::{Fetch, Work};
use murmur_store::Contents;

/// So fast does an honest node send in most tests: the file takes long enough that the other one is asked as well.
const HONEST_BYTES_PER_S: u64 = 2_000_000;
/// So fast where it takes a while to find out about the other one.
const PATIENT_BYTES_PER_S: u64 = 800_000;

/// Pulls the file from an honest node and one that plays this trick. Everything that is ever held is right, and in the end the trickster
/// has no stream left. Returns what was told on the way.
async fn pull_in_spite_of(trick: Trick, honest_bytes_per_s: u64) -> (World, Rogue, Vec<serde_json::Value>) {
    let world = World::new().await;
    let rogue = world.rogue(world.claim(), trick).await;
    let _honest = world.honest(Some(honest_bytes_per_s)).await;
    world.knows_holders(2).await;
    let pull = Pull::begin(&world).await;
    let events = pull.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
    until("no stream of the trickster is left", || rogue.open_streams() == 0).await;
    (world, rogue, events)
}

/// It was asked, found out, and is named.
async fn is_found_out(trick: Trick) {
    let (_world, rogue, events) = pull_in_spite_of(trick, HONEST_BYTES_PER_S).await;
    assert!(rogue.asked() > 0);
    assert_eq!(events.last().unwrap()["liars"][0], rogue.id(), "{events:#?}");
}

/// It was asked, and then left alone: somebody saw it in this state.
async fn is_left_alone(trick: Trick, state: &str) {
    let rate = if state == "slow" { PATIENT_BYTES_PER_S } else { HONEST_BYTES_PER_S };
    let (_world, rogue, events) = pull_in_spite_of(trick, rate).await;
    assert!(rogue.asked() > 0);
    let is_it = |source: &serde_json::Value| source["node"] == rogue.id() && source["state"] == state;
    let sources = events.iter().filter_map(|event| event["fetch"]["sources"].as_array());
    assert!(sources.flatten().any(is_it), "{events:#?}");
    assert_eq!(events.last().unwrap()["liars"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_in_a_right_looking_stream_are_found_out() {
    is_found_out(Trick::Wrong { at: 0.5 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn right_bytes_and_then_wrong_ones_are_found_out() {
    is_found_out(Trick::Wrong { at: 1.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_cut_short_are_fetched_elsewhere() {
    is_left_alone(Trick::Truncated, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_without_bytes_are_fetched_elsewhere() {
    is_left_alone(Trick::Empty, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_stream_is_read_to_where_the_right_bytes_end() {
    let (_world, rogue, _) = pull_in_spite_of(Trick::Endless, HONEST_BYTES_PER_S).await;
    assert!(rogue.asked() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_falls_silent_is_left_alone() {
    is_left_alone(Trick::Silent, "slow").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_a_kilobyte_a_second_holds_nobody_up() {
    is_left_alone(Trick::Drip, "slow").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_announces_all_and_has_nothing_is_left_alone() {
    is_left_alone(Trick::Lacks, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_always_busy_is_left_alone() {
    is_left_alone(Trick::Busy, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_for_an_answer_does_no_harm() {
    is_left_alone(Trick::Garbage, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_garbage_of_what_it_has_is_not_asked() {
    let (_world, rogue, _) = pull_in_spite_of(Trick::GarbageOfContent, HONEST_BYTES_PER_S).await;
    assert_eq!(rogue.asked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_what_somebody_has_in_a_thousand_pieces_holds_nobody_up() {
    is_left_alone(Trick::Flood, "paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_owes_that_vanishes_comes_from_another() {
    let world = World::new().await;
    let rogue = world.rogue(world.claim(), Trick::Silent).await;
    let _honest = world.honest(Some(HONEST_BYTES_PER_S)).await;
    world.knows_holders(2).await;
    let pull = Pull::begin(&world).await;
    until("the one that vanishes was asked", || rogue.asked() > 0).await;
    rogue.vanishes();
    world.has_the_file(&pull.until_its_end(|_| world.holds_only_what_is_right()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_that_is_not_the_files_gives_way_to_the_right_one() {
    for (halves, trick) in [(1, Trick::Silent), (3, Trick::Wrong { at: 0.5 })] {
        let world = World::new().await;
        let claim = Claim { file_bytes: world.claim().file_bytes * halves / 2, ..world.claim() };
        // Two say the false one, and one the right one.
        let rogues = [world.rogue(claim, trick).await, world.rogue(claim, trick).await];
        let _honest = world.honest(None).await;
        world.knows_holders(3).await;
        world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| ()).await);
        assert!(rogues.iter().any(|rogue| rogue.asked() > 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_but_a_liar_it_says_so_and_goes_on_when_an_honest_node_comes() {
    let world = World::new().await;
    let rogue = world.rogue(world.claim(), Trick::Wrong { at: 0.5 }).await;
    world.knows_holders(1).await;
    let mut pull = Pull::begin(&world).await;
    pull.waits_for("nobody is left", |event| event["liars"][0] == rogue.id() && is_stuck(event, "nobody is known"))
        .await;
    let _honest = world.honest(None).await;
    world.has_the_file(&pull.until_its_end(|_| world.holds_only_what_is_right()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_but_a_busy_node_it_says_so_and_goes_on_when_another_comes() {
    let world = World::new().await;
    let _rogue = world.rogue(world.claim(), Trick::Busy).await;
    world.knows_holders(1).await;
    let mut pull = Pull::begin(&world).await;
    pull.waits_for("it is told of", |event| is_stuck(event, "busy or silent")).await;
    let _honest = world.honest(None).await;
    world.has_the_file(&pull.until_its_end(|_| world.holds_only_what_is_right()).await);
}

fn is_stuck(event: &serde_json::Value, because: &str) -> bool {
    event["fetch"]["stuck"].as_str().is_some_and(|reason| reason.contains(because))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taker_that_floods_and_reads_nothing_keeps_nobody_from_a_file() {
    /// The same number as in `give.rs`.
    const STREAMS_PER_TAKER_MAX: usize = 8;
    const FLOOD: usize = 300;
    let world = World::new().await;
    let honest = world.honest(None).await;
    let flooder = world.rogue(world.claim(), Trick::Lacks).await;
    let giver = honest.mesh().unwrap().node_id();
    flooder.knows(giver).await;
    let whole = Fetch { model: world.digest, ranges: vec![0..world.claim().file_bytes], only_hashes: false };
    let mut opening = tokio::task::JoinSet::new();
    for _ in 0..FLOOD {
        let (mesh, fetch) = (flooder.mesh(), Work::Fetch(whole.clone()));
        opening.spawn(async move {
            let (mut send, recv) = mesh.open_work(giver).await.ok()?;
            stream::write(&mut send, &fetch).await.ok()?;
            Some((send, recv))
        });
    }
    // Those that find no room on the connection give up after a while; the others are there.
    world.knows_holders(2).await;
    let pull = Pull::begin(&world).await;
    world.has_the_file(&pull.until_its_end(|_| ()).await);
    let (mut sent, mut refused) = (0, 0);
    for (_send, recv) in opening.join_all().await.into_iter().flatten() {
        match common::soon("an answer", Reader::<Work>::new(recv).next()).await {
            Ok(Some(Work::Sending)) => sent += 1,
            Ok(Some(Work::Refused(_))) => refused += 1,
            // Reset: it was not even looked at.
            Err(_) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!((1..=STREAMS_PER_TAKER_MAX).contains(&sent) && refused > FLOOD / 2, "{sent} sent, {refused} refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_one_node_no_more_answers_are_read_at_once_than_leave_room_for_all_else_however_many_files_it_has() {
    /// The same number as in `ask.rs`.
    const ANSWERS_PER_NODE_MAX: usize = 16;
    /// Two answers of each would be read, once its length is known.
    const FILES: u8 = 16;
    const FILE_BYTES: usize = 1 << 20;
    let world = World::new().await;
    let files = world.further_files(FILES, FILE_BYTES);
    let claim = Claim { file_bytes: FILE_BYTES as u64, ..world.claim() };
    let rogue = world.rogue_with(&files, claim, Trick::SilentBeforeTheLast, Vec::new()).await;
    let mut pulls = Vec::new();
    for file in &files {
        pulls.push(Pull::named(&world, &file.to_string()).await);
    }
    until("as many answers as there may be have begun", || rogue.open_streams() >= ANSWERS_PER_NODE_MAX).await;
    // Another node's file comes meanwhile.
    let _honest = world.honest(Some(HONEST_BYTES_PER_S)).await;
    world.knows_holders(1).await;
    let pull = Pull::named(&world, &world.digest.to_string()).await;
    let events = pull.until_its_end(|_| assert!(rogue.open_streams() <= ANSWERS_PER_NODE_MAX)).await;
    world.has_the_file(&events);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_comes_in_a_second_than_the_user_wants() {
    const BYTES_PER_S: u64 = 2_000_000;
    let limited = |options: NodeOptions| NodeOptions { download_bytes_per_s: Some(BYTES_PER_S), ..options };
    let world = World::with_taker(limited).await;
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let begun = Instant::now();
    world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| ()).await);
    // Some may come at once.
    let least = Duration::from_secs_f64(world.bytes() as f64 / BYTES_PER_S as f64) - Duration::from_millis(500);
    assert!(begun.elapsed() >= least, "{:?} for {} bytes", begun.elapsed(), world.bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_pulled_by_its_digest_and_has_the_name_that_nodes_give_it() {
    let world = World::new().await;
    let honest = world.honest(None).await;
    world.knows_holders(1).await;
    let digest = world.digest.to_string();
    let events = Pull::named(&world, &digest).await.until_its_end(|_| ()).await;
    world.has_the_file(&events);
    assert_eq!(events.last().unwrap()["name"], "tiny");
    // Once it is here nobody is needed.
    honest.shutdown().await;
    world.has_the_file(&Pull::named(&world, &digest).await.until_its_end(|_| ()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_stopped_takes_nothing_more_and_goes_on_later() {
    let world = World::new().await;
    let _honest = world.honest(Some(HONEST_BYTES_PER_S)).await;
    world.knows_holders(1).await;
    let mut pull = Pull::begin(&world).await;
    pull.waits_for("a part is there", |event| event["held_bytes"].as_u64() > Some(500_000)).await;
    assert!(world.taker.stop_pull("tiny"));
    let last = pull.until_its_end(|_| ()).await.pop().unwrap();
    assert!(last["reason"].as_str().unwrap().contains("stopped"), "{last}");
    until("nothing is fetched any more", || world.content_view()["fetch"].is_null()).await;
    let held = world.content_view()["held_bytes"].as_u64().unwrap();
    assert!(held < world.claim().file_bytes, "all of it was fetched");
    let again = Pull::begin(&world).await;
    let events = again.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
    assert!(!world.taker.stop_pull("tiny"));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_another_process_writes_a_pull_says_so_and_afterwards_it_completes() {
    let world = World::new().await;
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let content = Contents::at(&world.taker_dir).create(world.own_digest(), world.claim().file_bytes).unwrap();
    let other = fs::File::create(content.path().with_file_name("lock")).unwrap();
    other.lock().unwrap();
    let last = Pull::begin(&world).await.until_its_end(|_| ()).await.pop().unwrap();
    assert!(last["reason"].as_str().is_some_and(|reason| reason.contains("another process")), "{last}");
    other.unlock().unwrap();
    world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| ()).await);
}

/// Mounts a disk that is too small, and runs this test again there.
const ON_A_SMALL_DISK: &str = r#"mount -t tmpfs -o size=2m none "$MURMUR_TEST_DISK" || exit 77; exec "$@""#;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_ends_a_pull_with_what_to_do_and_what_had_come_is_kept() {
    let Some(disk) = std::env::var_os("MURMUR_TEST_DISK") else {
        let disk = tempfile::tempdir().unwrap();
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "a_full_disk_ends_a_pull_with_what_to_do_and_what_had_come_is_kept", "--nocapture"])
            .env("MURMUR_TEST_DISK", disk.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(77) || said.starts_with("unshare: ") {
            eprintln!("skipped: this system allows no file systems of one's own: {said}");
            return;
        }
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
        return;
    };
    let world = World::with_taker_at(disk.into()).await;
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let last = Pull::begin(&world).await.until_its_end(|_| world.holds_only_what_is_right()).await.pop().unwrap();
    let reason = last["reason"].as_str().unwrap();
    assert!(reason.contains("no space in") && reason.contains("--data-dir"), "{reason}");
    assert!(world.content_view()["held_bytes"].as_u64() > Some(0));
    let status = Command::new("mount").args(["-o", "remount,size=32m"]).arg(&world.taker_dir).status().unwrap();
    assert!(status.success());
    world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| world.holds_only_what_is_right()).await);
}
