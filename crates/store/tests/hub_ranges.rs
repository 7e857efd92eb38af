//! Ranges of a file on a hub that can be told to misbehave.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

mod hub_server;

use std::{sync::Arc, time::Duration};

use axum::http::StatusCode;
use hub_server::{Behaviour, COMMIT, Hub, sha256_of};
use murmur_gguf::ByteRange;
use murmur_store::{
    ErrorKind, HubRef,
    hub::{HubConfig, HubFile, RangeError},
};

async fn open(behaviour: Behaviour) -> (Arc<Hub>, HubFile) {
    let hub = Hub::start(behaviour).await;
    let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
    let mut config = HubConfig::new(&endpoint, Some("hf_secret".to_owned()), "unused".into()).unwrap();
    config.backoff_base = Duration::from_millis(1);
    config.stall_timeout = Duration::from_millis(300);
    let file = HubFile::open(&config, &"hf:someone/Tiny-GGUF".parse().unwrap()).await.unwrap();
    (hub, file)
}

/// What came, and how it ended.
async fn read(file: &HubFile, start: u64, end: u64) -> (Vec<u8>, Result<(), RangeError>) {
    let mut bytes = Vec::new();
    let reading = async {
        let mut transfer = file.range(ByteRange { start, end }).await?;
        let mut buffer = [0; 10_000];
        loop {
            match transfer.read(&mut buffer).await? {
                0 => return Ok(()),
                read => bytes.extend_from_slice(&buffer[..read]),
            }
        }
    };
    let outcome = reading.await;
    (bytes, outcome)
}

fn content() -> Vec<u8> {
    Behaviour::default().content
}

#[tokio::test]
async fn ranges_are_the_bytes_of_the_file() {
    for redirects in [true, false] {
        let (hub, file) = open(Behaviour { redirects, etag: Some("\"one\""), ..Behaviour::default() }).await;
        let bytes = content().len() as u64;
        assert_eq!((file.file(), file.commit(), file.bytes()), ("tiny-Q4_K_M.gguf", COMMIT, bytes));
        assert_eq!(file.sha256(), Some(sha256_of(&content()).as_str()));
        for (start, end) in [(0, 1), (16_384, 200_000), (bytes - 1, bytes), (0, bytes), (bytes - 5, bytes + 9), (7, 7)]
        {
            let (came, outcome) = read(&file, start, end).await;
            outcome.unwrap();
            assert_eq!(came, content()[start as usize..end.min(bytes) as usize]);
        }
        let tokens = hub.tokens_at_store.lock().unwrap();
        assert!(tokens.iter().all(Option::is_none), "the token went to another host");
        assert_eq!(tokens.is_empty(), !redirects);
    }
}

#[tokio::test]
async fn a_file_that_changes_is_noticed() {
    // Whether or not the server looks at If-Range.
    for honours_if_range in [true, false] {
        let (hub, file) = open(Behaviour { etag: Some("\"one\""), honours_if_range, ..Behaviour::default() }).await;
        read(&file, 0, 1_000).await.1.unwrap();
        hub.set(|behaviour| behaviour.etag = Some("\"two\""));
        let (came, outcome) = read(&file, 0, 1_000).await;
        let error = outcome.unwrap_err();
        assert!(matches!(error, RangeError::Changed { .. }) && came.is_empty(), "{error}");
        assert!(error.to_string().contains("its ETag was \"one\" and is \"two\""), "{error}");
    }
    for (size, start) in [(200_000, 0), (200_000, 250_000), (400_000, 0)] {
        let (hub, file) = open(Behaviour::default()).await;
        hub.set(|behaviour| behaviour.content.resize(size, 0));
        let (came, outcome) = read(&file, start, start + 1_000).await;
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains(&format!("and has {size}")) && came.is_empty(), "{error}");
    }
}

#[tokio::test]
async fn what_is_not_the_range_is_refused() {
    let cases = [
        (Behaviour { honours_ranges: false, ..Behaviour::default() }, "whole files only"),
        (Behaviour { shift: 1, ..Behaviour::default() }, "another range"),
        (Behaviour { too_many: 1, ..Behaviour::default() }, "more bytes"),
    ];
    for (behaviour, says) in cases {
        let (_hub, file) = open(behaviour).await;
        let (came, outcome) = read(&file, 1_000, 51_000).await;
        let error = outcome.unwrap_err();
        assert!(matches!(error, RangeError::Final(_)) && error.to_string().contains(says), "{error}");
        assert!(content()[1_000..51_000].starts_with(&came), "wrong bytes were handed on");
    }
    let (_hub, file) = open(Behaviour { honours_ranges: false, ..Behaviour::default() }).await;
    read(&file, 0, file.bytes()).await.1.unwrap();
}

#[tokio::test]
async fn a_transfer_that_stalls_or_breaks_off_has_handed_on_what_came() {
    let (hub, file) = open(Behaviour { breaks_off_after: Some(70_000), ..Behaviour::default() }).await;
    let (came, outcome) = read(&file, 10_000, 110_000).await;
    assert!(matches!(outcome, Err(RangeError::Later { .. })), "{outcome:?}");
    assert!(!came.is_empty() && content()[10_000..110_000].starts_with(&came));
    let begun = 10_000 + came.len() as u64;
    hub.set(|behaviour| behaviour.breaks_off_after = None);
    let (rest, outcome) = read(&file, begun, 110_000).await;
    outcome.unwrap();
    assert_eq!([came, rest].concat(), content()[10_000..110_000]);

    hub.set(|behaviour| behaviour.stalls = 1);
    let (_, outcome) = read(&file, 0, 10).await;
    let error = outcome.unwrap_err();
    assert!(matches!(&error, RangeError::Later { why, .. } if why.contains("nothing came")), "{error}");
    read(&file, 0, 10).await.1.unwrap();
}

#[tokio::test]
async fn an_overloaded_hub_says_when_to_come_back() {
    let (hub, file) = open(Behaviour::default()).await;
    let answers = [
        (StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "90")], Some(90)),
        (StatusCode::TOO_MANY_REQUESTS, vec![], None),
        (StatusCode::SERVICE_UNAVAILABLE, vec![("retry-after", "5")], Some(5)),
        (StatusCode::BAD_GATEWAY, vec![], None),
    ];
    for (status, headers, wait_s) in answers {
        hub.set(|behaviour| behaviour.refusals.push((status, headers)));
        let Err(RangeError::Later { why, retry_after, .. }) = read(&file, 0, 10).await.1 else { panic!("{status}") };
        assert!(why.contains(status.as_str()), "{why}");
        assert_eq!(retry_after, wait_s.map(Duration::from_secs));
    }
    read(&file, 0, 10).await.1.unwrap();
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let (hub, file) = open(Behaviour::default()).await;
    let cases = [
        (StatusCode::UNAUTHORIZED, vec![], ErrorKind::Unavailable, "token"),
        (StatusCode::FORBIDDEN, vec![("x-error-code", "GatedRepo")], ErrorKind::Unavailable, "Accept it"),
        (StatusCode::NOT_FOUND, vec![], ErrorKind::NotFound, "spelling"),
        (StatusCode::RANGE_NOT_SATISFIABLE, vec![], ErrorKind::Other, "HF_ENDPOINT"),
        (StatusCode::IM_A_TEAPOT, vec![], ErrorKind::Other, "HF_ENDPOINT"),
    ];
    for (status, headers, kind, says) in cases {
        hub.set(|behaviour| behaviour.refusals.push((status, headers)));
        let Err(RangeError::Final(error)) = read(&file, 0, 10).await.1 else { panic!("{status}") };
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says) && !error.to_string().contains("hf_secret"), "{error}");
    }
}

#[test]
fn the_file_that_a_name_means_is_chosen_without_a_hub_as_with_one() {
    let files = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "README.md"];
    let choose = |name: &str| name.parse::<HubRef>().unwrap().choose(&files);
    assert_eq!(choose("hf:someone/M-GGUF:q8_0"), Some("m-Q8_0.gguf"));
    assert_eq!(choose("hf:someone/M-GGUF"), Some("m-Q4_K_M.gguf"));
    assert_eq!(choose("hf:someone/M-GGUF:m-Q8_0.gguf"), Some("m-Q8_0.gguf"));
    assert_eq!(choose("hf:someone/M-GGUF:Q2_K"), None);
}
