//! Text and stop strings: whatever way the bytes are cut into tokens, the client sees the same.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, in its helpers too")]

use murmur_sampling::text::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
use murmur_sampling::{Emission, StopError, StopMatcher};
use proptest::prelude::*;

/// What the whole text is, and which stop string ended it, by looking at every prefix.
fn reference(bytes: &[u8], stops: &[String]) -> (String, Option<usize>) {
    for end in 1..=bytes.len() {
        let longest = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| bytes[..end].ends_with(stop.as_bytes()))
            .max_by_key(|(index, stop)| (stop.len(), usize::MAX - index));
        if let Some((index, stop)) = longest {
            return (String::from_utf8_lossy(&bytes[..end - stop.len()]).into_owned(), Some(index));
        }
    }
    (String::from_utf8_lossy(bytes).into_owned(), None)
}

fn run(tokens: &[Vec<u8>], stops: &[String]) -> (Vec<Emission>, StopMatcher) {
    let mut matcher = StopMatcher::new(stops).unwrap();
    let mut emissions: Vec<Emission> = tokens.iter().map(|token| matcher.push(token)).collect();
    emissions.push(matcher.finish());
    (emissions, matcher)
}

fn cut(bytes: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut rest = bytes;
    let mut tokens = Vec::new();
    for &length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (token, after) = rest.split_at(length.min(rest.len()));
        tokens.push(token.to_vec());
        rest = after;
    }
    tokens
}

/// Few letters, so that stop strings occur, begin and overlap; characters of 2 to 4 bytes; broken bytes.
fn text_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        8 => "[ab]".prop_map(String::into_bytes),
        2 => "[éß€😀]".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 1..3),
        1 => Just("😀".as_bytes()[..2].to_vec()),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn the_text_is_that_of_the_whole_however_it_is_cut(
        bytes in text_bytes(),
        stops in prop::collection::vec("[ab]{1,4}|[abé€]{2,6}|a{3,8}b", 0..6),
        // Now and then a token without bytes, as control tokens are.
        lengths in prop::collection::vec(0usize..5, 1..8).prop_map(|mut lengths| { lengths.push(1); lengths }),
    ) {
        let tokens = cut(&bytes, &lengths);
        let (emissions, matcher) = run(&tokens, &stops);
        let text: String = emissions.iter().map(|emission| emission.text.as_str()).collect();
        let stop = emissions.iter().find_map(|emission| emission.stop);
        let (expected_text, expected_stop) = reference(&bytes, &stops);
        prop_assert_eq!(&text, &expected_text);
        prop_assert_eq!(stop.map(|index| &stops[index]), expected_stop.map(|index| &stops[index]));
        prop_assert!(matcher.ended());

        // Every byte that is neither in a stop string's beginning nor in half a character was given out at once.
        let mut pushed: Vec<u8> = Vec::new();
        let mut given = String::new();
        for (token, emission) in tokens.iter().zip(&emissions) {
            pushed.extend(token);
            given.push_str(&emission.text);
            if emission.stop.is_some() {
                break;
            }
            let held_back = (0..=pushed.len())
                .rev()
                .find(|length| stops.iter().any(|stop| stop.as_bytes().starts_with(&pushed[pushed.len() - length..])))
                .unwrap_or(0);
            let certain = &pushed[..pushed.len() - held_back];
            let complete = match std::str::from_utf8(certain).err() {
                Some(_) => (0..4.min(certain.len() + 1))
                    .find(|incomplete| {
                        let tail = &certain[certain.len() - incomplete..];
                        *incomplete > 0
                            && std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
                    })
                    .unwrap_or(0),
                None => 0,
            };
            prop_assert_eq!(&given, &String::from_utf8_lossy(&certain[..certain.len() - complete]));
        }
    }

    #[test]
    fn tokens_are_released_with_their_last_byte(
        bytes in text_bytes(),
        stops in prop::collection::vec("[ab]{1,4}", 0..3),
        lengths in prop::collection::vec(0usize..5, 1..8).prop_map(|mut lengths| { lengths.push(1); lengths }),
    ) {
        // Valid text only, so that bytes given out can be counted.
        let bytes = String::from_utf8_lossy(&bytes).into_owned().into_bytes();
        let tokens = cut(&bytes, &lengths);
        let (emissions, _) = run(&tokens, &stops);
        let (mut given, mut released) = (0, 0);
        for emission in &emissions {
            given += emission.text.len();
            released += emission.tokens;
            let end: usize = tokens[..released].iter().map(Vec::len).sum();
            prop_assert!(end <= given, "a token was released before its text");
            if emission.stop.is_none() && given > 0 {
                let next = tokens.get(released).map_or(usize::MAX, |token| end + token.len());
                prop_assert!(next > given || tokens[released].is_empty(), "a token was kept although its text was given out");
            }
        }
        if emissions.iter().all(|emission| emission.stop.is_none()) {
            prop_assert_eq!(released, tokens.len());
        }
    }
}

#[test]
fn a_stop_string_across_tokens_is_cut_off_and_named() {
    let (emissions, _) = run(
        &["Hello ".into(), "wor".into(), "ld\nUs".into(), "er:".into(), " x".into()],
        &["###".into(), "\nUser:".into()],
    );
    assert_eq!(emissions[0], Emission { text: "Hello ".into(), tokens: 1, stop: None });
    assert_eq!(emissions[1], Emission { text: "wor".into(), tokens: 1, stop: None });
    assert_eq!(emissions[2], Emission { text: "ld".into(), tokens: 0, stop: None });
    assert_eq!(emissions[3], Emission { text: String::new(), tokens: 0, stop: Some(1) });
    assert_eq!(emissions[4], Emission::default());
    assert_eq!(emissions[5], Emission::default());
}

#[test]
fn a_character_split_over_tokens_comes_out_whole_with_its_last_token() {
    let smile = "😀".as_bytes();
    let (emissions, _) = run(&[smile[..1].into(), smile[1..3].into(), smile[3..].into()], &[]);
    assert_eq!(emissions[0], Emission::default());
    assert_eq!(emissions[1], Emission::default());
    assert_eq!(emissions[2], Emission { text: "😀".into(), tokens: 3, stop: None });
}

#[test]
fn half_a_character_at_the_end_becomes_a_replacement_character() {
    let (emissions, _) = run(&["ab€".as_bytes()[..4].into()], &[]);
    assert_eq!(emissions[0].text, "ab");
    assert_eq!(emissions[1], Emission { text: "\u{FFFD}".into(), tokens: 1, stop: None });
}

#[test]
fn thousands_of_stop_strings_cost_one_step_per_byte() {
    let stops: Vec<String> = (0..MAX_STOP_STRINGS).map(|i| format!("stop {i:05}!")).collect();
    let (mut many, mut one) = (StopMatcher::new(&stops).unwrap(), StopMatcher::new(&stops[..1]).unwrap());
    let turn = |matcher: &mut StopMatcher| {
        let began = std::time::Instant::now();
        let given: usize = (0..2_000).map(|_| matcher.push(b"stop 00 stop 0").text.len()).sum();
        (given, began.elapsed())
    };
    let turns: Vec<_> = (0..10).map(|_| (turn(&mut many), turn(&mut one))).collect();
    assert_eq!(turns.iter().map(|((given, _), _)| given).sum::<usize>(), 20_000 * 14 - "stop 0".len());
    // A busy machine does not hold up every turn of the one and none of the other. One after the other they would take
    // thousands of times as long.
    let [of_many, of_one] = [
        turns.iter().map(|((_, took), _)| took).min().unwrap(),
        turns.iter().map(|(_, (_, took))| took).min().unwrap(),
    ];
    assert!(*of_many < 50 * *of_one, "{of_many:?} {of_one:?}");
    assert_eq!(many.push(b"4095!").stop, Some(4095));
}

#[test]
fn too_many_too_long_and_empty_stop_strings_are_refused() {
    let many = vec!["x".to_owned(); MAX_STOP_STRINGS + 1];
    assert_eq!(StopMatcher::new(&many).unwrap_err(), StopError::TooMany { count: MAX_STOP_STRINGS + 1 });
    let long = ["x".repeat(MAX_STOP_BYTES + 1)];
    assert_eq!(StopMatcher::new(&long).unwrap_err(), StopError::TooLong { bytes: MAX_STOP_BYTES + 1 });
    assert_eq!(StopMatcher::new(&["a", ""]).unwrap_err(), StopError::Empty { index: 1 });
    assert!(StopMatcher::new(&["x".repeat(MAX_STOP_BYTES)]).is_ok());
}
