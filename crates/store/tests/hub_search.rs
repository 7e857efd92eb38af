//! Searches on a small hub on loopback.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

mod hub_server;

use std::{sync::Arc, time::Duration};

use axum::http::StatusCode;
use hub_server::{Behaviour, Hub, REPO};
use murmur_store::{
    ErrorKind, StoreError,
    hub::{HUB_SEARCH_MAX, HubConfig, HubModel, HubModelFile, search},
};

async fn hub(behaviour: Behaviour) -> (Arc<Hub>, HubConfig) {
    let hub = Hub::start(behaviour).await;
    let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
    let mut config = HubConfig::new(&endpoint, Some("hf_secret".to_owned()), std::env::temp_dir()).unwrap();
    config.attempts_max = 3;
    config.backoff_base = Duration::from_millis(1);
    (hub, config)
}

fn names(found: &[HubModel]) -> Vec<&str> {
    found.iter().map(|model| model.repo.as_str()).collect()
}

#[tokio::test]
async fn a_repository_is_found_with_its_files_their_sizes_its_licence_and_who_may_have_it() {
    let files = vec!["README.md", "b-Q8_0.gguf", "a-Q4_K_M.gguf", "mmproj-F16.gguf", "BF16/c-BF16-00001-of-00002.gguf"];
    let (hub, config) = hub(Behaviour { files, ..Behaviour::default() }).await;
    let bytes = Some(Behaviour::default().content.len() as u64);
    let file =
        |file: &str, quant: &str| HubModelFile { file: file.to_owned(), quantization: Some(quant.to_owned()), bytes };
    let found = search(&config, "tiny & small", 10).await.unwrap();
    let wanted = HubModel {
        repo: REPO.to_owned(),
        licence: Some("apache-2.0".to_owned()),
        is_gated: true,
        downloads: Some(42),
        files: vec![file("a-Q4_K_M.gguf", "Q4_K_M"), file("b-Q8_0.gguf", "Q8_0")],
        preferred: Some(0),
    };
    assert_eq!(found, [wanted]);
    let asked = "search=tiny+%26+small&filter=gguf&sort=downloads&direction=-1&limit=10";
    assert_eq!(*hub.searches.lock().unwrap(), [asked]);
}

#[tokio::test]
async fn a_search_goes_over_as_many_pages_as_it_takes_and_no_further() {
    let found = vec!["a/1", "a/2", "a/3", "a/4", "a/5", "a/6", "a/7"];
    let (hub, config) = hub(Behaviour { found, page_repos: 2, ..Behaviour::default() }).await;
    assert_eq!(names(&search(&config, "a", 3).await.unwrap()), ["a/1", "a/2", "a/3"]);
    assert_eq!(hub.searches.lock().unwrap().len(), 2);
    assert_eq!(search(&config, "a", usize::MAX).await.unwrap().len(), 7);
    assert!(hub.searches.lock().unwrap()[2].ends_with(&format!("limit={HUB_SEARCH_MAX}")));

    // A list without end.
    hub.set(|behaviour| (behaviour.found, behaviour.page_repos) = (vec!["a/1"; 50], 1));
    assert_eq!(search(&config, "a", 40).await.unwrap().len(), 5);
}

#[tokio::test]
async fn a_list_that_goes_on_at_another_place_is_not_followed_there() {
    let behaviour = Behaviour { found: vec!["a/1", "a/2"], page_repos: 1, leads_astray: true, ..Behaviour::default() };
    let (hub, config) = hub(behaviour).await;
    assert_eq!(names(&search(&config, "a", 10).await.unwrap()), ["a/1"]);
    assert_eq!(hub.searches.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_looked_at_or_pulled_is_left_out() {
    let found = vec!["a/hidden", "a/shown", "../up", "a/b/c", "nothing"];
    let (hub, config) = hub(Behaviour { found, hidden: vec!["a/hidden"], ..Behaviour::default() }).await;
    assert_eq!(names(&search(&config, "a", 10).await.unwrap()), ["a/shown"]);
    // A model in several files is one, if all are there.
    hub.set(|behaviour| behaviour.files = vec!["README.md", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
    let found = search(&config, "a", 10).await.unwrap();
    let part_bytes = hub.behaviour.lock().unwrap().content.len() as u64;
    assert_eq!((found[0].files.len(), found[0].files[0].bytes), (1, Some(2 * part_bytes)));
    hub.set(|behaviour| behaviour.files = vec!["README.md", "m-00001-of-00002.gguf"]);
    assert!(search(&config, "a", 10).await.unwrap().is_empty());
    hub.set(|behaviour| behaviour.found = vec!["a/hidden"]);
    assert_eq!(search(&config, "a", 10).await.unwrap_err().kind(), ErrorKind::NotFound);
    hub.set(|behaviour| behaviour.found = vec![]);
    assert!(search(&config, "a", 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_overloaded_hub_is_asked_again_and_one_that_wants_its_peace_is_told_with_the_time() {
    let refusals = vec![(StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "0")]), (StatusCode::BAD_GATEWAY, vec![])];
    let (hub, config) = hub(Behaviour { refusals, ..Behaviour::default() }).await;
    assert_eq!(search(&config, "tiny", 10).await.unwrap().len(), 1);
    hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "3600")])]);
    let error = search(&config, "tiny", 10).await.unwrap_err();
    assert!(matches!(error, StoreError::HubUnavailable { .. }) && error.to_string().contains("60 minutes"), "{error}");
}

#[tokio::test]
async fn a_list_that_is_too_long_is_not_read_to_its_end() {
    let (_hub, config) =
        hub(Behaviour { found: vec!["somebody/with-a-long-name"; 1 << 20], ..Behaviour::default() }).await;
    let error = search(&config, "a", 10).await.unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
}

#[tokio::test]
async fn a_text_that_no_name_has_is_refused_before_anybody_is_asked() {
    let (hub, config) = hub(Behaviour::default()).await;
    assert_eq!(search(&config, &"x".repeat(1000), 10).await.unwrap_err().kind(), ErrorKind::Usage);
    assert!(hub.searches.lock().unwrap().is_empty());
}
