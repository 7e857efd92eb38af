//! `murmur models`: what can be run, what a hub has, who guesses for whom, and what stays below a quota.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    ops::Range,
    path::{Path, PathBuf},
};

use common::{Home, Outcome, Server, http, until, unused_address};
use murmur_gguf::{
    Gguf, TensorInfo,
    synth::{self, Spec, Weights},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// An answer to requests that begin so: headers, body.
type Route = (String, String, Vec<u8>);

/// Answers as long as the test runs; returns its address.
fn hub(routes: Vec<Route>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that goes away is not the test's concern.
            let _ = answer(&mut stream, &routes);
        }
    });
    address
}

fn answer(stream: &mut TcpStream, routes: &[Route]) -> std::io::Result<()> {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut request)? > 2 {}
    let found = routes.iter().find(|(begins, ..)| request.starts_with(begins.as_str()));
    let (status, headers, body) = match found {
        Some((begins, headers, body)) => {
            let body: &[u8] = if begins.starts_with("HEAD") { &[] } else { body };
            ("200 OK", headers.as_str(), body)
        }
        None => ("404 Not Found", "content-length: 0\r\n", &[] as &[u8]),
    };
    write!(stream, "HTTP/1.1 {status}\r\n{headers}connection: close\r\n\r\n")?;
    stream.write_all(body)
}

fn text(begins: &str, body: String) -> Route {
    (begins.to_owned(), format!("content-length: {}\r\n", body.len()), body.into_bytes())
}

/// What a pull of the only file of a repository asks for.
fn repository(repo: &str, file: &str, licence: &str, content: &[u8]) -> Vec<Route> {
    let listing = format!(
        r#"{{"sha":"{COMMIT}","cardData":{{"license":"{licence}"}},"siblings":[{{"rfilename":"{file}","size":{}}}]}}"#,
        content.len()
    );
    let etag: String = repo.bytes().map(|byte| format!("{byte:02x}")).collect();
    let headers = format!("content-length: {}\r\netag: \"{etag}\"\r\n", content.len());
    vec![
        text(&format!("GET /api/models/{repo}/revision/main"), listing.clone()),
        text(&format!("GET /api/models/{repo}?blobs=true"), listing),
        (format!("HEAD /{repo}/resolve/{COMMIT}/{file}"), headers.clone(), Vec::new()),
        (format!("GET /{repo}/resolve/{COMMIT}/{file}"), headers, content.to_vec()),
    ]
}

fn with_hub(home: &Home, endpoint: &str, arguments: &[&str]) -> Outcome {
    let mut command = home.murmur(["models"].iter().chain(arguments));
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home.path().join("hf")).output().unwrap().into()
}

/// A model of a vocabulary that all of these share.
fn model(home: &Home, file: &str, layers: u32) -> PathBuf {
    let path = home.path().join(file);
    let spec = Spec::tiny("llama").unwrap().with_layers(layers).with_weights(Weights::Q8_0);
    synth::write(&spec, &path).unwrap();
    path
}

/// An entry of a list of recommended models.
fn listed(name: &str, file: &str, more: &str) -> String {
    format!(
        "[[model]]\nname = \"{name}\"\nreference = \"hf:me/{name}:Q8_0\"\nfile = \"{file}\"\nparameters = 1.0\nbytes = 1000\n\
         licence = \"mit\"\npurpose = \"tests\"\n{more}\nshape = {{ layers = 1, width = 8, feed_forward = 8, heads = 1, kv_heads = 1, \
         head_length = 8, vocabulary = 9, context = 99 }}\n"
    )
}

#[test]
fn the_recommended_models_say_which_of_them_fit() {
    let home = Home::new();
    let list = home.run(["models", "recommended", "--memory", "8GiB", "--json"]).succeeds().json();
    assert_eq!(list["memory_bytes"], 8u64 << 30);
    let models = list["models"].as_array().unwrap();
    let find = |name: &str| models.iter().find(|model| model["name"] == name).unwrap();
    assert_eq!((&find("Qwen3 0.6B")["fits"], &find("Llama 3.3 70B")["fits"]), (&true.into(), &false.into()));
    assert_eq!(find("Qwen3 8B")["draft"], "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0");
    assert!(find("Qwen3 8B")["nodes"].is_null() && find("Qwen3 8B")["here"].is_null());
    let memory: Vec<u64> = models.iter().map(|model| model["memory_bytes"].as_u64().unwrap()).collect();
    assert!(memory.is_sorted(), "{memory:?}");

    model(&home, "Qwen3-0.6B-Q8_0.gguf", 1);
    home.run(["models", "import", "Qwen3-0.6B-Q8_0.gguf"]).succeeds();
    let table = home.run(["models", "recommended", "--memory", "1GiB"]).succeeds();
    let row = table.out.lines().find(|line| line.starts_with("Qwen3 0.6B")).unwrap();
    assert!(row.contains("Qwen3-0.6B-Q8_0  ") && row.contains("apache-2.0"), "{row}");
    assert!(
        table.err.contains("1.0 GiB are there to be used") && table.err.contains("try: murmur run "),
        "{}",
        table.err
    );
    let quiet = home.run(["models", "recommended", "--quiet"]).succeeds();
    assert!(quiet.err.is_empty() && quiet.out.starts_with("NAME"), "{quiet:?}");
    home.run(["models", "recommended", "--memory", "much"]).fails(2, "8GiB");
}

#[test]
fn a_list_of_the_users_takes_the_place_of_the_recommended_one_and_a_broken_one_is_told() {
    let home = Home::new();
    let own = listed("Mine", "mine-Q8_0.gguf", "");
    home.write("data/recommended.toml", &own);
    let list = home.run(["models", "recommended", "--json"]).succeeds().json();
    assert_eq!((list["models"].as_array().unwrap().len(), &list["models"][0]["name"]), (1, &"Mine".into()));
    // Beside the configuration file, wherever that is.
    home.write("elsewhere/config.toml", "");
    let list = home.run(["models", "recommended", "--json", "--config", "elsewhere/config.toml"]).succeeds().json();
    assert!(list["models"].as_array().unwrap().len() > 20);

    home.write("data/recommended.toml", own.replace("bytes = 1000", "bytes = 0"));
    home.run(["models", "recommended"]).fails(2, "recommended.toml cannot be used: 'Mine'");
    home.write("data/recommended.toml", [0xff, 0xfe]);
    home.run(["models", "recommended"]).fails(2, "recommended.toml");
    home.write("data/recommended.toml", "#".repeat(2 << 20));
    home.run(["models", "recommended"]).fails(2, "larger than");
    // Nothing else depends on it.
    model(&home, "m.gguf", 1);
    home.run(["models", "import", "m.gguf"]).succeeds();
    home.run(["models", "show", "m"]).succeeds();
}

#[test]
fn a_search_on_the_hub_shows_what_there_is_and_what_would_be_taken() {
    let home = Home::new();
    let list = r#"[{"id":"Qwen/Qwen3-8B-GGUF"},{"id":"a/huge-GGUF"}]"#;
    let files =
        r#"[{"rfilename":"Qwen3-8B-Q4_K_M.gguf","size":1048576},{"rfilename":"Qwen3-8B-Q8_0.gguf","size":2097152}]"#;
    let qwen = format!(r#"{{"downloads":7,"gated":false,"cardData":{{"license":"apache-2.0"}},"siblings":{files}}}"#);
    let huge = r#"{"gated":"auto","siblings":[{"rfilename":"huge-Q4_K_M.gguf","size":1125899906842624}]}"#;
    let endpoint = hub(vec![
        text("GET /api/models?search=qwen+3&filter=gguf&sort=downloads&direction=-1&limit=2 ", list.to_owned()),
        text("GET /api/models/Qwen/Qwen3-8B-GGUF?blobs=true ", qwen),
        text("GET /api/models/a/huge-GGUF?blobs=true ", huge.to_owned()),
        text("GET /api/models?search=nothing", "[]".to_owned()),
        ("GET /api/models?search=page".to_owned(), "content-type: text/html\r\n".to_owned(), b"<html>".to_vec()),
    ]);
    let found = with_hub(&home, &endpoint, &["search", "qwen 3", "--hub", "--limit", "2", "--json"]).succeeds().json();
    let (qwen, huge) = (&found["models"][0], &found["models"][1]);
    assert_eq!(
        (&qwen["repo"], &qwen["licence"], &qwen["gated"]),
        (&"Qwen/Qwen3-8B-GGUF".into(), &"apache-2.0".into(), &false.into())
    );
    assert_eq!((&qwen["preferred"], &qwen["downloads"]), (&"Qwen3-8B-Q4_K_M.gguf".into(), &7.into()));
    assert_eq!((&qwen["files"][1]["quantization"], &qwen["files"][1]["bytes"]), (&"Q8_0".into(), &2_097_152.into()));
    assert_eq!(qwen["draft"], "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0");
    assert_eq!((&huge["gated"], &huge["files"][0]["fits"]), (&true.into(), &false.into()));

    let table = with_hub(&home, &endpoint, &["search", "qwen 3", "--hub", "--limit", "2"]).succeeds();
    let row = table.out.lines().find(|line| line.starts_with("Qwen/Qwen3-8B-GGUF")).unwrap();
    for part in ["apache-2.0", "Q4_K_M", "1.0 MiB", "Q8_0 2.0 MiB"] {
        assert!(row.contains(part), "no {part:?} in: {row}");
    }
    assert!(table.err.contains("HF_TOKEN says by whom"), "{}", table.err);
    assert!(
        table.err.contains("murmur serve hf:Qwen/Qwen3-8B-GGUF --draft hf:Qwen/Qwen3-0.6B-GGUF:Q8_0"),
        "{}",
        table.err
    );

    assert!(
        with_hub(&home, &endpoint, &["search", "nothing", "--hub"])
            .succeeds()
            .err
            .contains("no GGUF models with 'nothing'")
    );
    with_hub(&home, &endpoint, &["search", "page", "--hub"]).fails(1, "a web page instead of data");
    with_hub(&home, &endpoint, &["search", "--hub"]).fails(2, "<TEXT>");
    with_hub(&home, &endpoint, &["search", "x", "--hub", "--limit", "0"]).fails(2, "--limit");
    with_hub(&home, &endpoint, &["search", "x", "--limit", "5"]).fails(2, "--hub");
    let offline = Home::new().with("HF_HUB_OFFLINE", "1");
    with_hub(&offline, &endpoint, &["search", "qwen 3", "--hub"]).fails(5, "HF_HUB_OFFLINE");
    with_hub(&offline, &endpoint, &["pull", "hf:Qwen/Qwen3-8B-GGUF"]).fails(5, "HF_HUB_OFFLINE");
}

#[test]
fn the_licence_of_a_pull_is_told_listed_and_shown() {
    let home = Home::new();
    let content = std::fs::read(model(&home, "source.gguf", 1)).unwrap();
    let endpoint = hub(repository("a/tiny", "tiny-Q8_0.gguf", "apache-2.0", &content));
    let pulled = with_hub(&home, &endpoint, &["pull", "hf:a/tiny"]).succeeds();
    assert!(
        pulled.err.contains("pulling tiny-Q8_0.gguf (") && pulled.err.contains(", licence apache-2.0)"),
        "{}",
        pulled.err
    );
    let listed = home.run(["models", "ls", "--json"]).succeeds().json();
    assert_eq!(listed[0]["licence"], "apache-2.0");
    assert!(home.run(["models", "ls"]).succeeds().out.contains("apache-2.0"));
    assert!(home.run(["models", "show", "tiny-Q8_0"]).succeeds().out.contains("licence       apache-2.0"));
    assert_eq!(home.run(["models", "show", "tiny-Q8_0", "--json"]).succeeds().json()["licence"], "apache-2.0");
    // A file that states none.
    assert!(home.run(["models", "show", "source.gguf"]).succeeds().out.contains("licence       -"));
}

#[test]
fn the_smallest_model_of_the_same_vocabulary_is_offered_as_a_draft() {
    let home = Home::new();
    model(&home, "large.gguf", 8);
    model(&home, "small.gguf", 1);
    let alone = home.run(["models", "import", "large.gguf", "--json"]).succeeds().json();
    assert!(alone["draft"].is_null(), "{alone}");
    let offered = home.run(["models", "import", "small.gguf"]).succeeds();
    assert!(!offered.err.contains("--draft"), "a draft has none of its own: {}", offered.err);
    let shown = home.run(["models", "show", "large"]).succeeds().out;
    assert!(shown.contains("murmur serve large --draft small\n"), "{shown}");
    let draft = &home.run(["models", "show", "large", "--json"]).succeeds().json()["draft"];
    assert_eq!((&draft["model"], &draft["is_here"]), (&"small".into(), &true.into()));
}

#[test]
fn a_recommended_draft_is_offered_with_what_there_is_to_pull() {
    let home = Home::new();
    model(&home, "Qwen3-8B-Q4_K_M.gguf", 1);
    let offered = home.run(["models", "import", "Qwen3-8B-Q4_K_M.gguf"]).succeeds().err;
    let says = "murmur serve Qwen3-8B-Q4_K_M --draft hf:Qwen/Qwen3-0.6B-GGUF:Q8_0 (609.4 MiB to pull)";
    assert!(offered.contains(says), "{offered}");
    model(&home, "Qwen3-0.6B-Q8_0.gguf", 1);
    home.run(["models", "import", "Qwen3-0.6B-Q8_0.gguf", "--name", "guesser"]).succeeds();
    // Under another name nobody knows what it is.
    assert!(home.run(["models", "show", "Qwen3-8B-Q4_K_M"]).succeeds().out.contains("--draft hf:Qwen"));
    home.run(["models", "import", "Qwen3-0.6B-Q8_0.gguf"]).succeeds();
    let shown = home.run(["models", "show", "Qwen3-8B-Q4_K_M"]).succeeds().out;
    assert!(shown.contains("--draft Qwen3-0.6B-Q8_0\n"), "{shown}");
}

#[test]
fn a_quota_is_set_shown_kept_by_pulls_and_lifted() {
    let home = Home::new();
    let content = std::fs::read(model(&home, "source.gguf", 1)).unwrap();
    let bytes = content.len() as u64;
    let mut routes = repository("a/one", "one-Q8_0.gguf", "mit", &content);
    routes.extend(repository("a/two", "two-Q8_0.gguf", "mit", &content));
    let endpoint = hub(routes);
    let no_quota = home.run(["models", "quota", "--json"]).succeeds().json();
    assert_eq!(no_quota, serde_json::json!({"quota_bytes": null, "taken_bytes": 0, "downloads": []}));

    with_hub(&home, &endpoint, &["pull", "hf:a/one"]).succeeds();
    home.run(["models", "quota", &(bytes + 10).to_string()]).succeeds();
    let pulled = with_hub(&home, &endpoint, &["pull", "hf:a/two"]).succeeds();
    assert!(
        pulled.err.contains("removed one-Q8_0 to make room") && pulled.err.contains("last used just now"),
        "{}",
        pulled.err
    );
    let listed = home.run(["models", "ls"]).succeeds().out;
    let one = listed.lines().find(|line| line.starts_with("one-Q8_0")).unwrap();
    assert!(one.contains("pull it again"), "{listed}");
    home.run(["models", "show", "one-Q8_0"]).fails(3, "murmur models pull hf:a/one:one-Q8_0.gguf");

    home.run(["models", "pin", "two-Q8_0"]).succeeds();
    let shown = home.run(["models", "quota"]).succeeds();
    assert!(shown.out.contains("two-Q8_0") && shown.out.contains("pinned"), "{}", shown.out);
    assert!(shown.err.contains("the quota is"), "{}", shown.err);
    with_hub(&home, &endpoint, &["pull", "hf:a/one"]).fails(4, "do not fit into the quota").fails(4, "two-Q8_0 (");
    // Less than there is: what can go goes at once.
    let too_little = home.run(["models", "quota", "1KiB"]).succeeds();
    assert!(too_little.err.contains("the rest is pinned or in use"), "{}", too_little.err);
    home.run(["models", "pin", "two-Q8_0", "--off"]).succeeds();
    let collected = home.run(["models", "gc", "--json"]).succeeds().json();
    assert_eq!((&collected["freed_bytes"], &collected["removed"][0]["names"][0]), (&bytes.into(), &"two-Q8_0".into()));

    assert_eq!(
        home.run(["models", "quota", "none", "--json"]).succeeds().json()["quota_bytes"],
        serde_json::Value::Null
    );
    with_hub(&home, &endpoint, &["pull", "hf:a/one"]).succeeds();
    with_hub(&home, &endpoint, &["pull", "hf:a/two"]).succeeds();
    home.run(["models", "quota", "lots"]).fails(2, "or none");
    let without_server = home.run(["models", "search", "--api", &unused_address()]);
    without_server.fails(5, "no murmur server");
}

/// Nobody outside this machine is asked or told anything.
#[cfg(unix)]
const ALONE: [&str; 5] = ["--relay=none", "--no-nostr", "--no-mdns", "--bind", "127.0.0.1:0"];

/// A pull by the client at this address.
#[cfg(unix)]
fn pull_at(home: &Home, server: &Server, endpoint: &str) -> Outcome {
    with_hub(home, endpoint, &["pull", "hf:a/tiny", "--api", &server.address])
}

#[cfg(unix)]
#[test]
fn a_model_of_the_hub_comes_from_the_mesh_where_a_node_has_it_and_else_from_the_hub() {
    let founder = Home::new();
    let content = std::fs::read(model(&founder, "source.gguf", 1)).unwrap();
    let endpoint = hub(repository("a/tiny", "tiny-Q8_0.gguf", "mit", &content));
    with_hub(&founder, &endpoint, &["pull", "hf:a/tiny"]).succeeds();
    founder.run(["mesh", "create", "home"]).succeeds();
    let serving = Server::start(&founder, [&["tiny-Q8_0", "--mesh", "home"], &ALONE[..]].concat());
    let ticket = founder.run(["mesh", "invite", "--json", "--api", &serving.address]).succeeds().json();
    let ticket = ticket["ticket"].as_str().unwrap();

    let joined = |home: &Home| {
        let client = ["client", "--json", "--api", "127.0.0.1:0", "--join", ticket];
        Server::ready(home.murmur([&client, &ALONE[..]].concat()))
    };
    // Whoever leaves the hub alone has it from the other node.
    let offline = Home::new().with("HF_HUB_OFFLINE", "1");
    let client = joined(&offline);
    until("the file is known in the mesh", || {
        let (_, answer) = http::get(&client.address, "/api/models");
        answer["models"][0]["nodes"][0]["held_bytes"].is_u64().then_some(())
    });
    let small = listed("Small", "small-Q8_0.gguf", "").replace("1000", "200");
    offline.write("data/recommended.toml", listed("Tiny", "tiny-Q8_0.gguf", "draft = \"hf:me/Small:Q8_0\"") + &small);
    let list = offline.run(["models", "recommended", "--json", "--api", &client.address]).succeeds().json();
    let nodes: Vec<_> = list["models"].as_array().unwrap().iter().map(|model| &model["nodes"]).collect();
    assert_eq!(nodes, [0, 1], "{list}");
    let found = offline.run(["models", "search", "TINY", "--api", &client.address]).succeeds();
    assert!(found.err.contains("murmur serve tiny-Q8_0 --draft hf:me/Small:Q8_0"), "{found:?}");
    let pulled = pull_at(&offline, &client, &endpoint).succeeds();
    assert!(pulled.err.contains("pulled hf:a/tiny") && pulled.err.contains("murmur run tiny-Q8_0"), "{}", pulled.err);
    let listed = offline.run(["models", "ls", "--json"]).succeeds().json();
    assert_eq!((&listed[0]["name"], &listed[0]["origin"]["kind"]), (&"tiny-Q8_0".into(), &"mesh".into()));
    assert!(std::fs::read(listed[0]["path"].as_str().unwrap()).unwrap() == content);

    // Who runs or serves it by that name has it from there as well.
    let runs = Home::new().with("HF_HUB_OFFLINE", "1");
    let client = joined(&runs);
    until("the file is known in the mesh", || {
        let (_, answer) = http::get(&client.address, "/api/models");
        answer["models"][0]["nodes"][0]["held_bytes"].is_u64().then_some(())
    });
    let run = ["run", "hf:a/tiny", "Once", "--max-tokens", "2", "--quiet", "--json", "--api", &client.address];
    assert_eq!(runs.run(run).succeeds().json()["model"], "tiny-Q8_0");
    let serves = Home::new().with("HF_HUB_OFFLINE", "1");
    let server = ["serve", "hf:a/tiny", "--no-hub", "--json", "--api", "127.0.0.1:0", "--join", ticket];
    let server = Server::ready(serves.murmur([&server, &ALONE[..]].concat()));
    until("it is served", || {
        let (_, status) = http::get(&server.address, "/api/status");
        let model = &status["node"]["models"][0];
        (model["id"] == "tiny-Q8_0" && model["state"] == "ready").then_some(())
    });
    assert_eq!(serves.run(["models", "show", "hf:a/tiny", "--json"]).succeeds().json()["store_name"], "tiny-Q8_0");

    // What no node has comes from the hub alone; what is not being pulled cannot be stopped.
    let other = hub(repository("a/other", "other-Q8_0.gguf", "mit", &content));
    let home = Home::new();
    let client = joined(&home);
    let pulled = with_hub(&home, &other, &["pull", "hf:a/other", "--json", "--api", &client.address]).succeeds().json();
    assert_eq!(pulled["origin"]["kind"], "hub");
    let stopped = home.run(["models", "pull", "hf:a/other", "--stop", "--api", &client.address]).succeeds();
    assert!(stopped.err.contains("was not being pulled"), "{}", stopped.err);
}

#[cfg(unix)]
#[test]
fn who_has_signed_a_model_is_shown_travels_with_it_and_can_be_demanded() {
    let maker = Home::new();
    let file = model(&maker, "tiny-Q8_0.gguf", 1);
    let imported = maker.run(["models", "import", file.to_str().unwrap()]).succeeds();
    assert!(!maker.run(["models", "show", "tiny-Q8_0"]).succeeds().out.contains("signed by"), "{}", imported.err);
    let signed = maker.run(["models", "sign", "tiny-Q8_0", "--json"]).succeeds().json();
    let key = signed["signature"]["signer"].as_str().unwrap();
    let again = maker.run(["models", "sign", "tiny-Q8_0"]).succeeds();
    assert!(again.err.contains(&format!("murmur models pull tiny-Q8_0 --signed-by {key}")), "{}", again.err);
    let shown = maker.run(["models", "show", "tiny-Q8_0"]).succeeds().out;
    let line = shown.lines().find(|line| line.starts_with("signed by")).unwrap();
    assert!(line.contains(&format!("{key} (this machine), just now, as tiny-Q8_0")), "{line}");
    assert_eq!(shown.matches("signed by").count(), 1, "{shown}");

    maker.run(["mesh", "create", "home"]).succeeds();
    let serving = Server::start(&maker, [&["tiny-Q8_0", "--mesh", "home"], &ALONE[..]].concat());
    let ticket = maker.run(["mesh", "invite", "--json", "--api", &serving.address]).succeeds().json();
    let taker = Home::new();
    let client = ["client", "--json", "--api", "127.0.0.1:0", "--join", ticket["ticket"].as_str().unwrap()];
    let client = Server::ready(taker.murmur([&client, &ALONE[..]].concat()));
    until("the file is known in the mesh", || {
        let (_, answer) = http::get(&client.address, "/api/models");
        answer["models"][0]["nodes"][0]["held_bytes"].is_u64().then_some(())
    });
    let search = |home: &Home, server: &Server| -> String {
        let found = home.run(["models", "search", "tiny", "--api", &server.address]).succeeds().out;
        found.lines().find(|line| line.starts_with("tiny-Q8_0")).unwrap().to_owned()
    };
    assert!(search(&maker, &serving).ends_with("this machine"));
    assert!(search(&taker, &client).ends_with(&key[..10]), "{}", search(&taker, &client));
    let found = taker.run(["models", "search", "--json", "--api", &client.address]).succeeds().json();
    let signature = &found[0]["signatures"][0];
    assert_eq!((&signature["signer"], &signature["own"]), (&key.into(), &false.into()));

    let stranger = "ab".repeat(32);
    let pull =
        |signer: &str| taker.run(["models", "pull", "tiny-Q8_0", "--signed-by", signer, "--api", &client.address]);
    pull(&stranger).fails(1, "no node of the mesh shows that").fails(1, key);
    assert_eq!(taker.run(["models", "ls", "--json"]).succeeds().json(), serde_json::json!([]));
    let pulled = pull(key).succeeds();
    assert!(pulled.err.contains(&format!("signed by {key}")), "{}", pulled.err);
    let shown = taker.run(["models", "show", "tiny-Q8_0", "--json"]).succeeds().json();
    let signature = &shown["signatures"][0];
    assert_eq!(
        (&signature["signer"], &signature["own"], &signature["fits"]),
        (&key.into(), &false.into(), &true.into())
    );
    // What is here is not taken for what somebody else has signed.
    pull(&stranger).fails(1, "no node of the mesh shows that");

    // Whoever serves it by its name has it with what was signed, and hands that on.
    let server = Home::new();
    let arguments =
        ["serve", "tiny-Q8_0", "--json", "--api", "127.0.0.1:0", "--join", ticket["ticket"].as_str().unwrap()];
    let serving_on = Server::ready(server.murmur([&arguments, &ALONE[..]].concat()));
    until("what was signed is there", || {
        let (_, answer) = http::get(&serving_on.address, "/api/models");
        (answer["models"][0]["signatures"][0]["signer"] == key).then_some(())
    });

    // Who may serve only what a key has signed has nothing of what another one has signed, and what is here without that is refused.
    let picky = Home::new();
    let serve = |home: &Home, signer: &str| {
        let words = ["serve", "tiny-Q8_0", "--signed-by", signer, "--json", "--api", "127.0.0.1:0", "--join"];
        home.murmur([&words[..], &[ticket["ticket"].as_str().unwrap()], &ALONE[..]].concat())
    };
    let refusing = Server::ready(serve(&picky, &stranger));
    let waiting = until("it is refused", || {
        let (_, status) = http::get(&refusing.address, "/api/status");
        let waiting = status["node"]["wanted"][0]["waiting"].as_str()?.to_owned();
        waiting.contains("no node of the mesh shows that").then_some(waiting)
    });
    assert!(waiting.contains(&stranger) && waiting.contains(key), "{waiting}");
    let (_, status) = http::get(&refusing.address, "/api/status");
    assert_eq!(
        (&status["node"]["contents"], &status["node"]["models"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
    drop(refusing);
    let trusting = Server::ready(serve(&picky, key));
    until("it is served", || {
        let (_, status) = http::get(&trusting.address, "/api/status");
        (status["node"]["models"][0]["state"] == "ready").then_some(())
    });
    drop(trusting);
    let alone = |home: &Home, signer: &str| home.run(["serve", "tiny-Q8_0", "--signed-by", signer]);
    alone(&picky, &stranger).fails(1, "nothing on this machine shows that").fails(1, key);
    alone(&taker, &stranger).fails(1, "murmur models pull NAME --signed-by");
    let not_here = ["serve", "hf:a/tiny", "--signed-by", key];
    taker.run(not_here).fails(2, "only the nodes of a mesh could show");

    taker.run(["models", "pull", "tiny-Q8_0", "--signed-by", "me"]).fails(2, "64 hex digits");
    let nobody = ["models", "pull", "tiny-Q8_0", "--signed-by", key, "--api", &unused_address()];
    taker.run(nobody).fails(5, "known to the nodes of a mesh alone");
}

#[cfg(unix)]
#[test]
fn a_model_that_is_to_guess_comes_from_the_mesh_when_the_hub_is_left_alone_and_one_that_cannot_guess_ends_the_start() {
    let founder = Home::new();
    let content = std::fs::read(model(&founder, "source.gguf", 1)).unwrap();
    let endpoint = hub(repository("a/tiny", "tiny-Q8_0.gguf", "mit", &content));
    with_hub(&founder, &endpoint, &["pull", "hf:a/tiny"]).succeeds();
    founder.run(["mesh", "create", "home"]).succeeds();
    let serving = Server::start(&founder, [&["tiny-Q8_0", "--mesh", "home"], &ALONE[..]].concat());
    let ticket = founder.run(["mesh", "invite", "--json", "--api", &serving.address]).succeeds().json();
    let serve = |home: &Home, file: &str| {
        let words = ["serve", file, "--draft", "hf:a/tiny", "--json", "--api", "127.0.0.1:0", "--join"];
        home.murmur([&words[..], &[ticket["ticket"].as_str().unwrap()], &ALONE[..]].concat())
    };
    let home = Home::new().with("HF_HUB_OFFLINE", "1");
    model(&home, "large.gguf", 8);
    let server = Server::ready(serve(&home, "large.gguf"));
    let draft = until("it is served, and guessed for", || {
        let (_, status) = http::get(&server.address, "/api/status");
        let model = &status["node"]["models"][0];
        (model["state"] == "ready").then(|| model["draft"].clone())
    });
    assert!(draft["process_id"].is_u64(), "{draft}");
    let listed = home.run(["models", "ls", "--json"]).succeeds().json();
    let pulled = listed.as_array().unwrap().iter().find(|entry| entry["name"] == "tiny-Q8_0").unwrap();
    assert_eq!(pulled["origin"]["kind"], "mesh");
    assert!(std::fs::read(pulled["path"].as_str().unwrap()).unwrap() == content);

    // It is as large as what it would guess for.
    let home = Home::new().with("HF_HUB_OFFLINE", "1");
    model(&home, "same.gguf", 1);
    let refused = Outcome::from(serve(&home, "same.gguf").output().unwrap());
    assert!(refused.code == Some(2) && refused.out.contains("so a guess would take as long as"), "{refused:?}");
}

#[cfg(unix)]
#[test]
fn a_name_of_the_hub_that_there_is_not_is_refused_at_once_also_where_a_mesh_could_have_it() {
    let home = Home::new();
    let content = std::fs::read(model(&home, "source.gguf", 1)).unwrap();
    let endpoint = hub(repository("a/tiny", "tiny-Q8_0.gguf", "mit", &content));
    let serve = |reference: &str| -> Outcome {
        let arguments = [&["serve", reference, "--mesh", "home", "--api", "127.0.0.1:0"], &ALONE[..]].concat();
        let mut command = home.murmur(arguments);
        command.env("HF_ENDPOINT", &endpoint).env("HF_HOME", home.path().join("hf")).output().unwrap().into()
    };
    serve("hf:a/tinny").fails(3, "a/tinny is not on").fails(3, "spelling");
    serve("hf:a/tiny:Q3_K_M").fails(3, "is not on");
}

#[cfg(unix)]
#[test]
fn a_file_that_is_here_is_run_and_served_by_its_digest_without_asking_anybody() {
    let maker = Home::new();
    model(&maker, "tiny-Q8_0.gguf", 1);
    maker.run(["models", "import", "tiny-Q8_0.gguf"]).succeeds();
    let digest = maker.run(["models", "show", "tiny-Q8_0", "--json"]).succeeds().json()["digest"].clone();
    let digest = digest.as_str().unwrap();
    maker.run(["mesh", "create", "home"]).succeeds();
    let serving = Server::start(&maker, [&["tiny-Q8_0", "--mesh", "home"], &ALONE[..]].concat());
    let ticket = maker.run(["mesh", "invite", "--json", "--api", &serving.address]).succeeds().json();
    let taker = Home::new();
    taker.run(["serve", digest]).fails(3, "no model");
    let serve = ["serve", digest, "--json", "--threads", "1", "--api", "127.0.0.1:0"];
    let client = ["client", "--json", "--api", "127.0.0.1:0", "--join", ticket["ticket"].as_str().unwrap()];
    let client = Server::ready(taker.murmur([&client, &ALONE[..]].concat()));
    until("the file is known in the mesh", || {
        let (_, answer) = http::get(&client.address, "/api/models");
        answer["models"][0]["nodes"][0]["held_bytes"].is_u64().then_some(())
    });
    taker.run(["models", "pull", digest, "--api", &client.address]).succeeds();
    drop((client, serving));

    // Nobody is there who could be asked: the one has pulled it, the other has served it.
    for home in [&taker, &maker] {
        let run = ["run", digest, "hello", "--raw", "--max-tokens", "2", "--threads", "1", "--json"];
        assert_eq!(home.run(run).succeeds().json()["model"], "tiny-Q8_0");
        let alone = Server::ready(home.murmur(serve));
        assert_eq!(alone.ready["models"], serde_json::json!(["tiny-Q8_0"]));
        let at_the_server = home.run(run.iter().chain(&["--api", &alone.address]));
        assert_eq!(at_the_server.succeeds().json()["model"], "tiny-Q8_0");
        let (_, status) = http::get(&alone.address, "/api/status");
        assert!(status["node"]["models"][0]["generated_tokens"].as_u64() > Some(0), "{status}");
        drop(alone);
        let in_a_mesh = Server::ready(home.murmur([&serve[..], &["--mesh", "home"], &ALONE[..]].concat()));
        assert_eq!(in_a_mesh.ready["models"], serde_json::json!(["tiny-Q8_0"]));
        let (_, status) = http::get(&in_a_mesh.address, "/api/status");
        assert_eq!(status["node"]["wanted"], serde_json::json!([]), "it was here");
    }
}

#[cfg(unix)]
#[test]
fn a_search_says_how_fast_a_model_is_here_by_an_estimate_until_it_has_been_measured() {
    let home = Home::new();
    model(&home, "tiny-Q8_0.gguf", 8);
    let serving = Server::start(&home, [&["tiny-Q8_0.gguf", "--mesh", "home"], &ALONE[..]].concat());
    let found = || home.run(["models", "search", "--json", "--api", &serving.address]).succeeds().json();
    let estimate = until("the file is known", || found()[0]["speed"]["tokens_per_s"].as_f64());
    let table = home.run(["models", "search", "--api", &serving.address]).succeeds();
    assert!(table.out.contains("TOK/S HERE") && table.out.contains(" ~"), "{}", table.out);
    assert!(table.err.contains("~ is an estimate"), "{}", table.err);
    let request = serde_json::json!({"model": "tiny-Q8_0", "prompt": "ba ba", "max_tokens": 16, "ignore_eos": true});
    http::complete(&serving.address, &request);
    let measured = found()[0]["speed"].clone();
    assert_eq!(measured["is_estimate"], false, "{estimate} was estimated, then: {measured}");
    let table = home.run(["models", "search", "--api", &serving.address]).succeeds();
    assert!(!table.out.contains(" ~") && !table.err.contains("~ is an estimate"), "{table:?}");
}

/// The header of a model's file and the tensors of these layers of it, with those of the ends that are among them.
#[cfg(unix)]
fn bytes_of_layers(file: &Path, ranges: &[Range<u64>]) -> u64 {
    let gguf = Gguf::open(file).unwrap();
    let last = u64::from(gguf.layer_count().unwrap());
    let is_needed = |tensor: &&TensorInfo| match (tensor.layer(), tensor.name.as_str()) {
        (Some((layer, _)), _) => ranges.iter().any(|range| range.contains(&layer.into())),
        (None, "token_embd.weight") => ranges.iter().any(|range| range.start == 0),
        (None, _) => ranges.iter().any(|range| range.end == last),
    };
    gguf.header_bytes() + gguf.tensors().iter().filter(is_needed).map(|tensor| tensor.bytes).sum::<u64>()
}

/// What a machine has of a file, what has come of it since it started, and which layers of the model it holds, once it is ready.
#[cfg(unix)]
struct Part {
    held_bytes: u64,
    received_bytes: u64,
    layers: Range<u64>,
}

#[cfg(unix)]
impl Part {
    fn of(server: &Server) -> Self {
        until("it is ready", || {
            let (_, status) = http::get(&server.address, "/api/status");
            let (content, model) = (&status["node"]["contents"][0], &status["node"]["models"][0]);
            let held = &model["ring"]["held"];
            (model["state"] == "ready").then_some(())?;
            Some(Self {
                held_bytes: content["held_bytes"].as_u64()?,
                received_bytes: content["received_bytes"].as_u64()?,
                layers: held[0].as_u64()?..held[1].as_u64()?,
            })
        })
    }
}

#[cfg(unix)]
#[test]
fn a_stage_starts_with_exactly_its_own_bytes_and_with_more_layers_only_the_difference_is_fetched() {
    /// Of what is needed: hashes, and the rest of the groups at the edges of what is needed.
    const EXTRA: f64 = 0.02;
    let [holder, taker] = [Home::new(), Home::new()];
    let file = holder.model("tiny.gguf");
    holder.run(["mesh", "create", "home"]).succeeds();
    let ring = |of_holder: &str, of_taker: &str| {
        let engine = ["--ctx", "256", "--parallel", "1"];
        let has = ["tiny.gguf", "--mesh", "home", "--max-layers", of_holder];
        let has = Server::start(&holder, [&has, &engine[..], &ALONE[..]].concat());
        let ticket = holder.run(["mesh", "invite", "--json", "--api", &has.address]).succeeds().json();
        let wants = ["tiny", "--join", ticket["ticket"].as_str().unwrap(), "--max-layers", of_taker];
        let wants = Server::start(&taker, [&wants, &engine[..], &ALONE[..]].concat());
        let part = Part::of(&wants);
        let request = serde_json::json!({"model": "tiny", "prompt": "ba ba", "max_tokens": 4, "ignore_eos": true});
        http::complete(&wants.address, &request);
        let later = Part::of(&wants);
        assert_eq!(
            (part.held_bytes, &part.layers),
            (later.held_bytes, &later.layers),
            "nothing comes that is not needed"
        );
        later
    };
    let is_little_more = |bytes: u64, than: u64| (than..=than + (EXTRA * than as f64) as u64).contains(&bytes);

    let two = ring("6", "2");
    let needed = bytes_of_layers(&file, std::slice::from_ref(&two.layers));
    assert_eq!(two.layers.end - two.layers.start, 2);
    assert!(is_little_more(two.held_bytes, needed), "{} bytes are held of {needed}", two.held_bytes);
    assert!(is_little_more(two.received_bytes, needed), "{} bytes came of {needed}", two.received_bytes);
    let found = taker.run(["models", "ls", "--json"]).succeeds().json();
    assert_eq!(found, serde_json::json!([]), "a part is no model");

    let four = ring("4", "4");
    assert_eq!(four.layers.end - four.layers.start, 4);
    let all = bytes_of_layers(&file, &[two.layers, four.layers]);
    assert!(is_little_more(four.held_bytes, all), "{} bytes are held of {all}", four.held_bytes);
    let (came, lacked) = (four.received_bytes, all - needed);
    assert!(came as f64 <= (1.0 + EXTRA) * lacked as f64, "{came} bytes came, and {lacked} were lacking");
}
