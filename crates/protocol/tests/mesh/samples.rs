//! One of everything, for golden vectors; and any of everything, for properties.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;

use murmur_protocol::mesh::*;
use murmur_protocol::sampling::{Grammar, Sampled, SamplingParams};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// A node's key; others have other numbers.
pub(crate) fn node_key(number: u8) -> NodeKey {
    NodeKey::from_bytes(&[number; 32])
}

/// The key of a private mesh.
pub(crate) fn mesh_key() -> MeshKey {
    MeshKey::from_bytes(&[0xee; 32])
}

pub(crate) fn model() -> ServedModel {
    ServedModel {
        digest: ModelDigest::from_bytes([0x11; 32]),
        name: "qwen3-0.6b:q8_0".into(),
        state: ModelState::Ready,
        context_tokens: 32_768,
        parallel: 4,
        running: 2,
        queued: 1,
        decode_us_per_token: 21_500,
        prefill_us_per_token: 900,
        load_ms: 2_500,
        tokenizer: TokenizerDigest::from_bytes([0x22; 32]),
        exact: true,
        build: "b6500-cpu-avx2".into(),
        guesses: None,
    }
}

/// The same, and it would guess for others.
pub(crate) fn guesser() -> ServedModel {
    let vocabulary = VocabularyId::from_bytes([0x99; 8]);
    ServedModel { guesses: Some(GuessOffer { vocabulary, file_bytes: 639_446_688 }), ..model() }
}

pub(crate) fn stage() -> ServedStage {
    ServedStage {
        digest: ModelDigest::from_bytes([0x77; 32]),
        name: "llama-3.3-70b:q4_k_m".into(),
        layers: 80,
        first: 20,
        end: 52,
        state: ModelState::Loading,
        context_tokens: 16_384,
        parallel: 8,
        exact: true,
        build: "b6500-cpu-avx2".into(),
        memory_bytes: 20 << 30,
        decode_us_per_layer: 4_100,
        prefill_us_per_layer: 150,
        layers_max: 40,
    }
}

pub(crate) fn offer() -> ServedStage {
    let digest = ModelDigest::from_bytes([0x78; 32]);
    ServedStage { digest, first: 0, end: 0, state: ModelState::Available, layers_max: 0, ..stage() }
}

pub(crate) fn links() -> Vec<MeasuredLink> {
    vec![
        MeasuredLink::to(&node_key(2).node_id(), 850, 110_000_000),
        MeasuredLink::to(&node_key(3).node_id(), 41_000, 0),
    ]
}

pub(crate) fn machine() -> MachineSpeed {
    MachineSpeed { read_bytes_per_s: 21_000_000_000, multiply_adds_per_s: 48_000_000_000 }
}

pub(crate) fn contents() -> Vec<HeldContent> {
    let part = HeldContent {
        digest: ModelDigest::from_bytes([0x77; 32]),
        name: "llama-3.3-70b:q4_k_m".into(),
        file_bytes: 42_520_398_432,
        held_bytes: 17_179_869_184,
        source: None,
    };
    let whole =
        HeldContent { digest: ModelDigest::from_bytes([0x11; 32]), held_bytes: part.file_bytes, ..part.clone() };
    vec![part, whole]
}

pub(crate) fn contents_of_a_hub() -> Vec<HeldContent> {
    let source = "hf:someone/Llama-3.3-70B-GGUF@0123456789abcdef:Llama-3.3-70B-Q4_K_M.gguf".to_owned();
    contents().into_iter().map(|content| HeldContent { source: Some(source.clone()), ..content }).collect()
}

pub(crate) fn record() -> NodeRecord {
    NodeRecord {
        node: node_key(1).node_id(),
        mesh: MeshId::public("home"),
        sequence: 1_795_000_000_123,
        ttl_ms: 60_000,
        tombstone: false,
        role: Role::Worker,
        addresses: Addresses {
            relay: Some("https://relay.example./".into()),
            direct: vec!["192.0.2.7:4433".parse().unwrap(), "[2001:db8::7]:4433".parse().unwrap()],
        },
        models: vec![model()],
        software: "murmur 0.1.0".into(),
        capabilities: Capabilities::GRAMMARS.with(Capabilities::CARDS),
        memory_free_bytes: 12 << 30,
        certificate: None,
        stages: Vec::new(),
        links: Vec::new(),
        machine: None,
        contents: Vec::new(),
        region: String::new(),
    }
}

pub(crate) fn tombstone() -> NodeRecord {
    NodeRecord { tombstone: true, models: Vec::new(), sequence: 1_795_000_000_124, ..record() }
}

pub(crate) fn certificate() -> MemberCertificate {
    MemberCertificate {
        mesh: mesh_key().mesh_id(),
        node: node_key(1).node_id(),
        role: Role::Worker,
        serial: 0x0102_0304_0506_0708,
        issued_ms: 1_795_000_000_000,
        expires_ms: 1_826_536_000_000,
    }
}

pub(crate) fn revocations() -> RevocationList {
    let mut list = RevocationList::new(mesh_key().mesh_id());
    list.add(Revocation::Node(node_key(9).node_id()));
    list.add(Revocation::Serial(77));
    list
}

pub(crate) fn attestation() -> Attestation {
    Attestation {
        signer: node_key(2).node_id(),
        model: model().digest,
        manifest: ManifestDigest::from_bytes([0x33; 32]),
        file_bytes: 639_446_688,
        name: "qwen3-0.6b:q8_0".into(),
        licence: Some("apache-2.0".into()),
        source: Some("hf:Qwen/Qwen3-0.6B-GGUF@23749fefcc72300e3a2ad315e1317431b06b590a:Qwen3-0.6B-Q8_0.gguf".into()),
        signed_ms: 1_764_000_000_000,
    }
}

pub(crate) fn private_ticket() -> Ticket {
    Ticket {
        id: TicketId::from_bytes([0x33; 16]),
        mesh: mesh_key().mesh_id(),
        mesh_name: "lab".into(),
        issuer: node_key(1).node_id(),
        addresses: record().addresses,
        role: Role::Worker,
        expires_ms: 1_795_003_600_000,
        admission: Admission::Private { secret: BearerSecret::from_bytes([0x44; 16]), uses: NonZeroU32::new(3) },
    }
}

pub(crate) fn public_ticket() -> Ticket {
    Ticket {
        mesh: MeshId::public("home"),
        mesh_name: "home".into(),
        role: Role::Client,
        admission: Admission::Public,
        ..private_ticket()
    }
}

/// One of each message of the control stream.
pub(crate) fn controls() -> Vec<(&'static str, Control)> {
    let hello = Hello {
        versions: 1..=2,
        software: "murmur 0.1.0".into(),
        capabilities: Capabilities::GRAMMARS,
        mesh: mesh_key().mesh_id(),
        certificate: Some(certificate().sign(&mesh_key()).unwrap()),
        wall_clock_ms: 1_795_000_000_000,
    };
    let mut ids = [node_key(1).node_id(), node_key(2).node_id()];
    ids.sort();
    let redeem = Redeem {
        versions: 1..=2,
        mesh: mesh_key().mesh_id(),
        ticket: private_ticket().id,
        secret: BearerSecret::from_bytes([0x44; 16]),
    };
    let redeemed = Redeemed {
        certificate: certificate().sign(&mesh_key()).unwrap(),
        mesh_secret: MeshSecret::from_bytes([0x55; 32]),
        mesh_name: "lab".into(),
    };
    let aged = AgedRecord { age_ms: 1_500, record: record().sign(&node_key(1)).unwrap() };
    vec![
        ("hello", Control::Hello(hello)),
        ("refusal", Control::Refusal(Refusal::new(RefusalCode::Revoked, "the certificate was revoked"))),
        ("digest", Control::Digest(ids.iter().copied().zip([7, 8]).collect())),
        ("records", Control::Records(vec![aged])),
        ("want", Control::Want(ids.to_vec())),
        ("revocations", Control::Revocations(revocations().sign(&mesh_key()).unwrap())),
        ("redeem", Control::Redeem(redeem)),
        ("redeemed", Control::Redeemed(redeemed)),
        ("goodbye", Control::Goodbye(tombstone().sign(&node_key(1)).unwrap())),
        ("ping", Control::Ping(0x0102_0304_0506_0708)),
        ("pong", Control::Pong(0x0102_0304_0506_0708)),
        ("summary", Control::Summary(summary())),
        ("differing", Control::Differing(Differing { ranges: vec![1, 3], entries: vec![(ids[1], 8)] })),
        ("unknown", Control::Unknown { kind: 999 }),
    ]
}

/// Of a table of two nodes, one of them twice.
pub(crate) fn summary() -> Summary {
    let entries = [(1, 7), (2, 8), (2, 9)].map(|(number, sequence)| (node_key(number).node_id(), sequence));
    let entries = entries.iter().map(|(node, sequence)| (*node, summary::mark(node, *sequence)));
    Summary::of(0x0102_0304_0506_0708, Ranges::new(4).unwrap(), entries)
}

pub(crate) fn open() -> Open {
    Open {
        request: RequestId::from_bytes([0x66; 16]),
        model: model().digest,
        build: Some(model().build),
        exact: true,
        tokenizer: model().tokenizer,
        prompt: vec![1, 500, 151_643],
        generated: vec![42],
        max_tokens: 256,
        sampling: SamplingParams {
            temperature: 0.8,
            top_k: 40,
            min_p: 0.05,
            presence_penalty: -0.0,
            logit_bias: vec![(5, f32::NEG_INFINITY), (6, 1.5)],
            seed: 0x0123_4567_89ab_cdef,
            top_logprobs: Some(2),
            grammar: Some(Grammar::Regex("[a-z]+".into())),
            ..SamplingParams::default()
        },
        requires: Capabilities::GRAMMARS.with(Capabilities::LOGPROBS),
    }
}

pub(crate) fn stage_open() -> StageOpen {
    StageOpen {
        model: stage().digest,
        first: 20,
        end: 52,
        layers: 80,
        context_tokens: 16_384,
        parallel: 8,
        exact: true,
        build: Some(stage().build),
        ring: RingId::from_bytes([0x88; 16]),
    }
}

pub(crate) fn draft_open() -> DraftOpen {
    let vocabulary = VocabularyId::from_bytes([0x99; 8]);
    DraftOpen { model: model().digest, vocabulary, context_tokens: 16_384, parallel: 8 }
}

/// One of each message of the work stream.
pub(crate) fn works() -> Vec<(&'static str, Work)> {
    let fetch = Fetch { model: model().digest, ranges: vec![0..16_384, 1_048_576..3_145_728], only_hashes: false };
    let sampled = vec![
        Sampled { token: 42, logprob: Some(-0.25), top: vec![(42, -0.25), (7, -1.5)], grammar_ended: false },
        Sampled { token: 0, logprob: None, top: Vec::new(), grammar_ended: true },
    ];
    let finished = Finished {
        reason: FinishReason::EndOfText,
        prompt_tokens: 4,
        cached_tokens: 3,
        generated_tokens: 2,
        prefill_us: 12_000,
        decode_us: 43_000,
        // As a worker that does not guess, and one of before there was guessing.
        right_guesses: 0,
        wrong_guesses: 0,
    };
    let reason = || "why it is so".to_owned();
    vec![
        ("open", Work::Open(Box::new(open()))),
        ("admitted", Work::Admitted(Admitted { lease_ms: 30_000, cached_tokens: 3 })),
        ("busy", Work::Refused(Refused::Busy { retry_ms: 1_200 })),
        ("no memory", Work::Refused(Refused::NoMemory { reason: reason() })),
        ("bad request", Work::Refused(Refused::BadRequest { reason: reason() })),
        ("not served", Work::Refused(Refused::NotServed { reason: reason() })),
        ("prefill", Work::Prefill(Prefill { done_tokens: 256, cached_tokens: 3 })),
        ("tokens", Work::Tokens(Tokens { first: 1, sampled })),
        ("finished", Work::Finished(finished)),
        ("failed", Work::Failed(Failed::new(FailureCode::Leaving, "the worker leaves"))),
        ("get card", Work::GetCard(model().digest)),
        ("card", Work::Card(Card { tokenizer: card_digest(b"card"), total_bytes: 4 })),
        ("card part", Work::CardPart(b"card".to_vec())),
        ("stage", Work::Stage(Box::new(stage_open()))),
        ("hop", Work::Hop(stage_open().ring)),
        ("question for a content", Work::WatchContent(WatchContent { model: model().digest, only_news: false })),
        ("question for news of a content", Work::WatchContent(WatchContent { model: model().digest, only_news: true })),
        (
            "content",
            Work::Content(Content {
                file_bytes: 42_520_398_432,
                header_bytes: 7_831_552,
                held: vec![0..8_388_608, 21_260_189_696..38_439_059_456],
                gives_hashes: false,
                is_news: false,
            }),
        ),
        (
            "content with its hashes",
            Work::Content(Content {
                file_bytes: 32_768,
                header_bytes: 9,
                held: std::iter::once(0..16_384).collect(),
                gives_hashes: true,
                is_news: false,
            }),
        ),
        (
            "news of a content",
            Work::Content(Content {
                file_bytes: 32_768,
                header_bytes: 9,
                held: std::iter::once(16_384..32_768).collect(),
                gives_hashes: false,
                is_news: true,
            }),
        ),
        ("request for bytes", Work::Fetch(fetch.clone())),
        ("request for hashes", Work::Fetch(Fetch { only_hashes: true, ..fetch })),
        ("the bytes follow", Work::Sending),
        ("question for attestations", Work::GetAttestations(model().digest)),
        ("attestations", Work::Attestations(vec![attestation().sign(&node_key(2)).unwrap()])),
        ("draft", Work::Draft(draft_open())),
        ("unknown", Work::Unknown { kind: 999 }),
    ]
}

fn any_id<Id: From<[u8; 32]> + std::fmt::Debug>() -> impl Strategy<Value = Id> {
    any::<[u8; 32]>().prop_map(Id::from)
}

fn any_text(characters_max: usize) -> impl Strategy<Value = String> {
    // Two bytes per character at most, so that half the byte limit in characters always fits.
    vec(prop_oneof![Just('é'), proptest::char::range(' ', '~')], 1..=characters_max / 2)
        .prop_map(|characters| characters.into_iter().collect())
}

fn any_role() -> impl Strategy<Value = Role> {
    select(vec![Role::Worker, Role::Client, Role::Seed, Role::Unknown])
}

pub(crate) fn any_addresses() -> impl Strategy<Value = Addresses> {
    let v4 = (any::<[u8; 4]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::from((Ipv4Addr::from(ip), port)));
    let v6 = (any::<[u8; 16]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::from((Ipv6Addr::from(ip), port)));
    (option::of(any_text(256)), vec(prop_oneof![v4, v6], 0..12))
        .prop_map(|(relay, direct)| Addresses::publishable(relay, direct))
}

fn any_model() -> impl Strategy<Value = ServedModel> {
    let guesses = option::of((any::<[u8; 8]>(), any::<u64>()));
    let texts = (any_id(), any_text(96), any_state(), any_id(), any_text(64));
    (texts, any::<[u32; 8]>(), any::<bool>(), guesses).prop_map(
        |((digest, name, state, tokenizer, build), n, exact, guesses)| ServedModel {
            digest,
            name,
            state,
            context_tokens: n[0],
            parallel: n[1],
            running: n[2],
            queued: n[3],
            decode_us_per_token: n[4],
            prefill_us_per_token: n[5],
            load_ms: n[6],
            tokenizer,
            exact,
            build,
            guesses: guesses.map(|(id, file_bytes)| GuessOffer { vocabulary: id.into(), file_bytes }),
        },
    )
}

fn any_state() -> impl Strategy<Value = ModelState> {
    use ModelState::*;
    select(vec![Available, Loading, Ready, Draining, Unknown])
}

/// The layers of a model, and a range of at least so many of them.
fn any_layers(least: u32) -> impl Strategy<Value = (u32, u32, u32)> {
    (1..=model::LAYERS_MAX)
        .prop_flat_map(move |layers| (Just(layers), 0..=layers - least))
        .prop_flat_map(move |(layers, first)| (Just(layers), Just(first), first + least..=layers))
}

fn any_stage() -> impl Strategy<Value = ServedStage> {
    ((any_id(), any_text(96), any_state(), any_text(64)), any_layers(0), any::<[u32; 5]>(), any::<u64>(), any::<bool>())
        .prop_map(|((digest, name, state, build), (layers, first, end), n, memory_bytes, exact)| ServedStage {
            digest,
            name,
            layers,
            first,
            end,
            state,
            context_tokens: n[0],
            parallel: n[1],
            exact,
            build,
            memory_bytes,
            decode_us_per_layer: n[2],
            prefill_us_per_layer: n[3],
            layers_max: n[4],
        })
}

fn any_links() -> impl Strategy<Value = Vec<MeasuredLink>> {
    let ways = btree_map(any_id::<NodeId>(), (1..=measured::RTT_US_MAX, any::<u64>()), 0..4);
    ways.prop_map(|ways| ways.iter().map(|(peer, way)| MeasuredLink::to(peer, way.0, way.1)).collect())
}

fn any_contents() -> impl Strategy<Value = Vec<HeldContent>> {
    let source = option::of(any_text(40).prop_map(|text| format!("hf:{text}")));
    let held = (any_text(20), 1..=content::FILE_BYTES_MAX, any::<prop::sample::Index>(), source);
    btree_map(any_id::<ModelDigest>(), held, 0..4).prop_map(|contents| {
        let held = |(digest, (name, file_bytes, held, source)): (_, (String, u64, prop::sample::Index, _))| {
            let name = if name.is_empty() { "a".to_owned() } else { name };
            let held_bytes = held.index(usize::try_from(file_bytes).unwrap()) as u64;
            HeldContent { digest, name, file_bytes, held_bytes, source }
        };
        contents.into_iter().map(held).collect()
    })
}

/// What node 2 could sign.
pub(crate) fn any_attestation() -> impl Strategy<Value = Attestation> {
    let texts = (any_text(20), option::of(any_text(40)), option::of(any_text(40)));
    (any_id(), any_id(), 1..=content::FILE_BYTES_MAX, texts, any::<u64>()).prop_map(
        |(model, manifest, file_bytes, (name, licence, source), signed_ms)| Attestation {
            signer: node_key(2).node_id(),
            model,
            manifest,
            file_bytes,
            name,
            licence,
            source,
            signed_ms,
        },
    )
}

/// Whole groups, apart from each other.
fn any_ranges(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<std::ops::Range<u64>>> {
    vec((1..1_000u64, 1..1_000u64), count).prop_map(|pairs| {
        let mut at = 0;
        let range = |(gap, length)| {
            let start = at + gap * content::GROUP_BYTES;
            at = start + length * content::GROUP_BYTES;
            start..at
        };
        pairs.into_iter().map(range).collect()
    })
}

fn any_content() -> impl Strategy<Value = Content> {
    let figures = (1..1_000u64, any::<prop::sample::Index>(), any::<bool>(), any::<bool>());
    (any_ranges(0..20), figures).prop_map(|(held, (more, header, gives_hashes, is_news))| {
        let file_bytes = held.last().map_or(0, |last| last.end) + more;
        let header_bytes = header.index(usize::try_from(file_bytes).unwrap()) as u64;
        Content { file_bytes, header_bytes, held, gives_hashes, is_news }
    })
}

pub(crate) fn any_stage_open() -> impl Strategy<Value = StageOpen> {
    let figures = (1..=open::REQUEST_TOKENS_MAX as u32, 1..=ring::STAGE_PARALLEL_MAX);
    ((any_id(), any::<[u8; 16]>()), any_layers(1), figures, option::of(any_text(64)), any::<bool>()).prop_map(
        |((model, ring), (layers, first, end), (context_tokens, parallel), build, exact)| StageOpen {
            model,
            first,
            end,
            layers,
            context_tokens,
            parallel,
            exact,
            build,
            ring: ring.into(),
        },
    )
}

fn any_draft_open() -> impl Strategy<Value = DraftOpen> {
    let figures = (1..=open::REQUEST_TOKENS_MAX as u32, 1..=ring::STAGE_PARALLEL_MAX);
    (any_id(), any::<[u8; 8]>(), figures).prop_map(|(model, vocabulary, (context_tokens, parallel))| DraftOpen {
        model,
        vocabulary: vocabulary.into(),
        context_tokens,
        parallel,
    })
}

/// Any record of a mesh, with the key of its node.
pub(crate) fn any_record(mesh: MeshId) -> impl Strategy<Value = (NodeRecord, NodeKey)> {
    (
        any::<[u8; 32]>().prop_map(|secret| NodeKey::from_bytes(&secret)),
        (any::<u64>(), 1..=record::TTL_MS_MAX, any::<bool>(), any_role(), any_addresses()),
        (vec(any_model(), 0..7), vec(any_stage(), 0..4)),
        (
            any_text(64),
            any::<u64>(),
            any::<u64>(),
            option::of(any_certificate()),
            any_links(),
            any::<Option<(u64, u64)>>(),
            any_contents(),
            any_text(32),
        ),
    )
        .prop_map(move |(key, (sequence, ttl_ms, tombstone, role, addresses), (models, stages), rest)| {
            let (software, capabilities, memory_free_bytes, certificate, links, machine, contents, region) = rest;
            let record = NodeRecord {
                node: key.node_id(),
                mesh,
                sequence,
                ttl_ms,
                tombstone,
                role,
                addresses,
                models,
                software,
                capabilities: Capabilities(capabilities),
                memory_free_bytes,
                certificate: certificate.map(|certificate| certificate.sign(&mesh_key()).unwrap()),
                stages,
                links,
                machine: machine.map(|(read_bytes_per_s, multiply_adds_per_s)| MachineSpeed {
                    read_bytes_per_s,
                    multiply_adds_per_s,
                }),
                contents,
                region,
            };
            (record, key)
        })
}

pub(crate) fn any_certificate() -> impl Strategy<Value = MemberCertificate> {
    (any_id(), any_role(), any::<u64>(), 0..u64::MAX / 2, 1..u64::MAX / 2).prop_map(
        |(node, role, serial, issued_ms, lasts_ms)| MemberCertificate {
            mesh: mesh_key().mesh_id(),
            node,
            role,
            serial,
            issued_ms,
            expires_ms: issued_ms + lasts_ms,
        },
    )
}

pub(crate) fn any_revocations() -> impl Strategy<Value = RevocationList> {
    (any::<u64>(), btree_set(any_id(), 0..20), btree_set(any::<u64>(), 0..20))
        .prop_map(|(version, nodes, serials)| RevocationList { mesh: mesh_key().mesh_id(), version, nodes, serials })
}

pub(crate) fn any_ticket() -> impl Strategy<Value = (Ticket, NodeKey)> {
    let private = (any::<[u8; 16]>(), any::<u32>())
        .prop_map(|(secret, uses)| (BearerSecret::from_bytes(secret), NonZeroU32::new(uses)));
    (
        any::<[u8; 32]>().prop_map(|secret| NodeKey::from_bytes(&secret)),
        (any::<[u8; 16]>(), any_id(), any_text(64), any_addresses(), any_role(), 1..=u64::MAX),
        option::of(private),
    )
        .prop_map(|(key, (id, mesh, mesh_name, addresses, role, expires_ms), private)| {
            let ticket = Ticket {
                id: id.into(),
                mesh: if private.is_some() { mesh } else { MeshId::public(&mesh_name) },
                mesh_name,
                issuer: key.node_id(),
                addresses,
                role,
                expires_ms,
                admission: match private {
                    Some((secret, uses)) => Admission::Private { secret, uses },
                    None => Admission::Public,
                },
            };
            (ticket, key)
        })
}

pub(crate) fn any_control() -> impl Strategy<Value = Control> {
    let signed = || any_record(MeshId::public("any")).prop_map(|(record, key)| record.sign(&key).unwrap());
    let signed_certificate = || any_certificate().prop_map(|certificate| certificate.sign(&mesh_key()).unwrap());
    let versions = || (1..1_000u32, 0..1_000u32).prop_map(|(min, more)| min..=min + more);
    let aged = (any::<u32>(), signed()).prop_map(|(age_ms, record)| AgedRecord { age_ms, record });
    prop_oneof![
        ((versions(), any_text(64), any::<u64>()), any_id(), option::of(signed_certificate()), any::<u64>()).prop_map(
            |((versions, software, bits), mesh, certificate, wall_clock_ms)| Control::Hello(Hello {
                versions,
                software,
                capabilities: Capabilities(bits),
                mesh,
                certificate,
                wall_clock_ms
            })
        ),
        (select(vec![RefusalCode::Version, RefusalCode::Leaving, RefusalCode::Unknown]), any_text(512))
            .prop_map(|(code, reason)| Control::Refusal(Refusal { code, reason })),
        vec((any_id(), any::<u64>()), 0..50).prop_map(Control::Digest),
        vec(aged, 0..4).prop_map(Control::Records),
        vec(any_id(), 0..50).prop_map(Control::Want),
        any_revocations().prop_map(|list| Control::Revocations(list.sign(&mesh_key()).unwrap())),
        (versions(), any_id(), any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(|(versions, mesh, ticket, secret)| {
            Control::Redeem(Redeem { versions, mesh, ticket: ticket.into(), secret: BearerSecret::from_bytes(secret) })
        }),
        (signed_certificate(), any::<[u8; 32]>(), any_text(64)).prop_map(|(certificate, secret, mesh_name)| {
            Control::Redeemed(Redeemed { certificate, mesh_secret: MeshSecret::from_bytes(secret), mesh_name })
        }),
        signed().prop_map(Control::Goodbye),
        any::<u64>().prop_map(Control::Ping),
        any::<u64>().prop_map(Control::Pong),
        (any::<u64>(), 0..1_000usize, vec((any_id(), any::<u64>()), 0..50)).prop_map(|(salt, nodes, entries)| {
            Control::Summary(Summary::of(salt, Ranges::for_nodes(nodes), entries.into_iter()))
        }),
        (vec(0..summary::RANGES_MAX as u16, 0..50), vec((any_id(), any::<u64>()), 0..50))
            .prop_map(|(ranges, entries)| Control::Differing(Differing { ranges, entries })),
        (100..=u16::MAX).prop_map(|kind| Control::Unknown { kind }),
    ]
}

/// Any float at all: every bit pattern, NaN with payload and -0.0 among them.
fn any_bits() -> impl Strategy<Value = f32> {
    prop_oneof![any::<u32>().prop_map(f32::from_bits), select(vec![0.0, -0.0, 1.0, f32::NEG_INFINITY])]
}

fn any_sampling() -> impl Strategy<Value = SamplingParams> {
    let grammar = prop_oneof![
        Just(Grammar::JsonObject),
        any::<String>().prop_map(Grammar::JsonSchema),
        any::<String>().prop_map(Grammar::Regex),
        any::<String>().prop_map(Grammar::Lark),
    ];
    (
        (any_bits(), any_bits(), any_bits(), any_bits(), any_bits(), any_bits(), any_bits()),
        vec((any::<i32>(), any_bits()), 0..8),
        (any::<u32>(), any::<u32>(), any::<u64>(), any::<bool>(), any::<Option<u8>>(), option::of(grammar)),
    )
        .prop_map(|(f, logit_bias, (top_k, penalty_last_n, seed, ignore_eos, top_logprobs, grammar))| {
            SamplingParams {
                temperature: f.0,
                top_k,
                top_p: f.1,
                min_p: f.2,
                typical_p: f.3,
                repeat_penalty: f.4,
                presence_penalty: f.5,
                frequency_penalty: f.6,
                penalty_last_n,
                logit_bias,
                seed,
                ignore_eos,
                top_logprobs,
                grammar,
            }
        })
}

pub(crate) fn any_open() -> impl Strategy<Value = Open> {
    (
        (any::<[u8; 16]>(), any_id(), option::of(any_text(64)), any::<bool>(), any_id()),
        (vec(0..=i32::MAX, 1..40), vec(0..=i32::MAX, 0..40), 40..=u32::MAX),
        any_sampling(),
        any::<u64>(),
    )
        .prop_map(
            |((request, model, build, exact, tokenizer), (prompt, generated, max_tokens), sampling, bits)| Open {
                request: request.into(),
                model,
                build,
                exact,
                tokenizer,
                prompt,
                generated,
                max_tokens,
                sampling,
                requires: Capabilities(bits),
            },
        )
}

pub(crate) fn any_tokens() -> impl Strategy<Value = Tokens> {
    let sampled = (0..=i32::MAX, option::of(any_bits()), vec((0..=i32::MAX, any_bits()), 0..6), any::<bool>())
        .prop_map(|(token, logprob, top, grammar_ended)| Sampled { token, logprob, top, grammar_ended });
    (0..u32::MAX - 64, vec(sampled, 1..=64)).prop_map(|(first, sampled)| Tokens { first, sampled })
}

pub(crate) fn any_work() -> impl Strategy<Value = Work> {
    prop_oneof![
        any_open().prop_map(|open| Work::Open(Box::new(open))),
        (0..=600_000u32, any::<u32>())
            .prop_map(|(lease_ms, cached_tokens)| Work::Admitted(Admitted { lease_ms, cached_tokens })),
        (0..=60_000u32).prop_map(|retry_ms| Work::Refused(Refused::Busy { retry_ms })),
        any_text(512).prop_map(|reason| Work::Refused(Refused::NoMemory { reason })),
        any_text(512).prop_map(|reason| Work::Refused(Refused::BadRequest { reason })),
        any_text(512).prop_map(|reason| Work::Refused(Refused::NotServed { reason })),
        any_text(512).prop_map(|reason| Work::Refused(Refused::Unknown { reason })),
        any::<(u32, u32)>()
            .prop_map(|(done_tokens, cached_tokens)| Work::Prefill(Prefill { done_tokens, cached_tokens })),
        any_tokens().prop_map(Work::Tokens),
        (select(vec![FinishReason::Length, FinishReason::Unknown]), any::<[u32; 5]>(), any::<[u64; 2]>()).prop_map(
            |(reason, n, us)| Work::Finished(Finished {
                reason,
                prompt_tokens: n[0],
                cached_tokens: n[1],
                generated_tokens: n[2],
                prefill_us: us[0],
                decode_us: us[1],
                right_guesses: n[3],
                wrong_guesses: n[4],
            })
        ),
        (select(vec![FailureCode::Engine, FailureCode::BadMessage, FailureCode::Unknown]), any_text(512))
            .prop_map(|(code, reason)| Work::Failed(Failed { code, reason })),
        any_id().prop_map(Work::GetCard),
        (any_id(), 1..1u32 << 26).prop_map(|(tokenizer, total_bytes)| Work::Card(Card { tokenizer, total_bytes })),
        vec(any::<u8>(), 1..300).prop_map(Work::CardPart),
        any_stage_open().prop_map(|open| Work::Stage(Box::new(open))),
        any::<[u8; 16]>().prop_map(|ring| Work::Hop(ring.into())),
        (any_id(), any::<bool>()).prop_map(|(model, only_news)| Work::WatchContent(WatchContent { model, only_news })),
        any_content().prop_map(Work::Content),
        (any_id(), any_ranges(1..20), any::<bool>()).prop_map(|(model, ranges, only_hashes)| Work::Fetch(Fetch {
            model,
            ranges,
            only_hashes
        })),
        Just(Work::Sending),
        any_id().prop_map(Work::GetAttestations),
        vec(any_attestation(), 0..3)
            .prop_map(|all| { Work::Attestations(all.iter().map(|one| one.sign(&node_key(2)).unwrap()).collect()) }),
        any_draft_open().prop_map(Work::Draft),
        (100..=u16::MAX).prop_map(|kind| Work::Unknown { kind }),
    ]
}
