//! Which file of a repository to take.
//!
//! Repositories hold one model in many quantisations, told apart by nothing but file names. Names are read as the hub's own
//! tools and llama.cpp's do: the quantisation is a word of the name, bounded by anything that is no letter, digit or `_`.

use std::{borrow::Cow, collections::HashSet};

use murmur_gguf::join::PARTS_MAX;

use crate::error::StoreError;

/// Quantisations in the order in which they are taken when the user names none: best quality per byte first (llama.cpp's own
/// default is `Q4_K_M`), then smaller neighbours, then larger ones, full precision last. `MXFP4` leads because a repository that
/// has it (gpt-oss) was trained in it.
const PREFERENCE: [&str; 24] = [
    "MXFP4", "Q4_K_M", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_K_L", "Q4_1", "Q4_0", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q6_K", "Q6_K_L", "Q8_0", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K", "BF16", "F16", "FP16", "F32",
];

/// A file of a model that was split (`name-00001-of-00003.gguf`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SplitPart<'a> {
    /// What all parts begin with.
    base: &'a str,
    pub(crate) number: u32,
    pub(crate) count: u32,
}

impl SplitPart<'_> {
    /// All parts, in their order.
    pub(crate) fn all(&self) -> Vec<String> {
        (1..=self.count).map(|number| self.name(number)).collect()
    }

    /// What the joined file is called.
    pub(crate) fn joined(&self) -> String {
        format!("{}.gguf", self.base)
    }

    fn name(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.base, self.count)
    }
}

/// Reads the part number out of a file's name, or its path. One part alone is a whole model.
pub(crate) fn split_part(file_name: &str) -> Option<SplitPart<'_>> {
    const DIGITS: usize = 5;
    let stem = strip_gguf(file_name)?;
    let (rest, count) = stem.split_at_checked(stem.len().checked_sub(DIGITS)?)?;
    let rest = rest.strip_suffix("-of-")?;
    let (rest, number) = rest.split_at_checked(rest.len().checked_sub(DIGITS)?)?;
    let base = rest.strip_suffix('-')?;
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u32>().ok()).flatten();
    let (number, count) = (digits(number)?, digits(count)?);
    let is_part = (2..=PARTS_MAX).contains(&(count as usize)) && (1..=count).contains(&number);
    is_part.then_some(SplitPart { base, number, count })
}

/// The file that stands for a model: the first part, of one in several files.
fn first(file: &str) -> Cow<'_, str> {
    split_part(file).map_or(Cow::Borrowed(file), |part| Cow::Owned(part.name(1)))
}

fn strip_gguf(file_name: &str) -> Option<&str> {
    let (stem, ending) = file_name.split_at_checked(file_name.len().checked_sub(".gguf".len())?)?;
    ending.eq_ignore_ascii_case(".gguf").then_some(stem)
}

/// Whether `file` is what the user wrote after `:`, as a file's name or as a quantisation. Any part of a model names all of it.
pub(crate) fn is_wanted(file: &str, wanted: &str) -> bool {
    let wanted = first(wanted);
    file == wanted || file.rsplit('/').next() == Some(&*wanted) || has_word(file, &wanted)
}

/// Whether a path contains `word`, bounded and whatever the case.
fn has_word(path: &str, word: &str) -> bool {
    let (path, word) = (path.to_ascii_lowercase(), word.to_ascii_lowercase());
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !word.is_empty()
        && path.match_indices(&word).any(|(at, found)| {
            !path[..at].chars().next_back().is_some_and(inside)
                && !path[at + found.len()..].chars().next().is_some_and(inside)
        })
}

/// Whether a file of a repository is a model, or a part of one. `mmproj` files are vision towers, `imatrix` files are calibration data:
/// GGUF, but not models.
fn is_model(file: &str) -> bool {
    strip_gguf(file).is_some() && !has_prefix_in_name(file, "mmproj") && !file.to_ascii_lowercase().contains("imatrix")
}

/// Those files of a repository that are models which can be pulled. Of one in several files it is the first, if all are there.
pub(crate) fn models<'a>(files: &[&'a str]) -> Vec<&'a str> {
    let present: HashSet<&str> = files.iter().copied().collect();
    let is_whole = |file: &str| match split_part(file) {
        Some(part) => part.number == 1 && part.all().iter().all(|part| present.contains(&**part)),
        None => true,
    };
    files.iter().copied().filter(|file| is_model(file) && is_whole(file)).collect()
}

/// The quantisation that a file's name tells, such as `Q4_K_M`, `UD-IQ2_XXS` or `BF16`.
pub(crate) fn quantization(file: &str) -> Option<String> {
    let words: Vec<&str> = file.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let (at, word) = words.iter().enumerate().rfind(|(_, word)| is_quantization(word))?;
    let is_dynamic = at.checked_sub(1).is_some_and(|before| words[before].eq_ignore_ascii_case("UD"));
    Some(if is_dynamic { format!("UD-{word}") } else { (*word).to_owned() })
}

fn is_quantization(word: &str) -> bool {
    let word = word.to_ascii_uppercase();
    let bits = ["IQ", "TQ", "Q"].iter().find_map(|kind| word.strip_prefix(kind));
    let is_bits = bits.is_some_and(|rest| {
        rest.starts_with(|c: char| ('1'..='8').contains(&c)) && (rest.len() == 1 || rest[1..].starts_with('_'))
    });
    is_bits || word.starts_with("MXFP4") || matches!(word.as_str(), "BF16" | "F16" | "FP16" | "F32" | "FP32")
}

/// Chooses one file of a repository.
///
/// `what` and `endpoint` are for messages.
pub(crate) fn choose<'a>(
    files: &[&'a str],
    wanted: Option<&str>,
    what: &str,
    endpoint: &str,
) -> Result<&'a str, StoreError> {
    let not_on_hub = |why: String, advice: String| StoreError::NotOnHub {
        what: what.to_owned(),
        endpoint: endpoint.to_owned(),
        why,
        advice,
    };
    let parts_missing = |why| not_on_hub(why, "Look for another repository, or ask its owner for the rest.".to_owned());
    if !files.iter().any(|file| is_model(file)) {
        return Err(not_on_hub(
            "the repository has no GGUF model".to_owned(),
            "Look for one whose name ends in -GGUF.".to_owned(),
        ));
    }
    let whole = models(files);
    let chosen = match wanted {
        Some(wanted) => {
            let matching = narrow(whole.iter().copied().filter(|file| is_wanted(file, wanted)).collect(), wanted);
            if matching.is_empty() && files.iter().any(|file| is_model(file) && is_wanted(&first(file), wanted)) {
                return Err(parts_missing(format!("of {wanted} only some parts are there")));
            }
            matching
        }
        None if whole.len() == 1 => whole.clone(),
        None => PREFERENCE
            .iter()
            .map(|quant| narrow(whole.iter().copied().filter(|file| has_word(file, quant)).collect(), quant))
            .find(|matching| !matching.is_empty())
            .unwrap_or_default(),
    };
    match chosen.as_slice() {
        [one] => Ok(one),
        [] if whole.is_empty() => Err(parts_missing("of every model in it only some parts are there".to_owned())),
        [] => {
            let why = wanted.map_or_else(
                || "no file has a known quantisation in its name".to_owned(),
                |w| format!("no file is, or has, '{w}'"),
            );
            Err(not_on_hub(
                why,
                format!("It has: {}. Name one, such as {what}:{}", listed(&whole), short_name(whole[0])),
            ))
        }
        several => Err(not_on_hub(
            "several files fit".to_owned(),
            format!("Name one of them: {}", listed_as_references(several, what)),
        )),
    }
}

/// Of several files with a quantisation, the plain one: `UD-Q4_K_M` ("dynamic") is another kind that happens to contain the word,
/// unless it is what was asked for.
fn narrow<'a>(matching: Vec<&'a str>, wanted: &str) -> Vec<&'a str> {
    if matching.len() < 2 {
        return matching;
    }
    let exact: Vec<&str> = matching.iter().copied().filter(|file| *file == wanted).collect();
    if !exact.is_empty() {
        return exact;
    }
    let dynamic = format!("ud-{}", wanted.to_ascii_lowercase());
    let plain: Vec<&str> = matching.iter().copied().filter(|file| !has_word(file, &dynamic)).collect();
    if plain.is_empty() { matching } else { plain }
}

fn has_prefix_in_name(file: &str, prefix: &str) -> bool {
    file.rsplit('/').next().is_some_and(|name| name.to_ascii_lowercase().starts_with(prefix))
}

/// Files in a message, with what to write for each; a repository may have hundreds.
fn listed(files: &[&str]) -> String {
    shorten(files.iter().map(|file| match quantization(file) {
        Some(quant) => format!("{quant} ({file})"),
        None => (*file).to_owned(),
    }))
}

/// What to write for a file.
fn short_name(file: &str) -> String {
    quantization(file).unwrap_or_else(|| file.to_owned())
}

fn listed_as_references(files: &[&str], what: &str) -> String {
    shorten(files.iter().map(|file| format!("{what}:{file}")))
}

fn shorten(items: impl ExactSizeIterator<Item = String>) -> String {
    const LISTED_MAX: usize = 12;
    let count = items.len();
    let mut text = items.take(LISTED_MAX).collect::<Vec<_>>().join(", ");
    if count > LISTED_MAX {
        text.push_str(&format!(" and {} more", count - LISTED_MAX));
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pick(files: &[&str], wanted: Option<&str>) -> Result<String, String> {
        choose(files, wanted, "hf:a/b", "https://hub").map(str::to_owned).map_err(|e| e.to_string())
    }

    const USUAL: [&str; 6] =
        ["README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf"];

    #[test]
    fn without_a_quant_the_preferred_one_is_taken() {
        assert_eq!(pick(&USUAL, None).unwrap(), "m-Q4_K_M.gguf");
        assert_eq!(pick(&["m-Q8_0.gguf", "m-F16.gguf"], None).unwrap(), "m-Q8_0.gguf");
        assert_eq!(pick(&["whatever.gguf", "README.md"], None).unwrap(), "whatever.gguf");
    }

    #[test]
    fn a_quant_is_found_as_a_whole_word_in_any_case() {
        assert_eq!(pick(&USUAL, Some("q8_0")).unwrap(), "m-Q8_0.gguf");
        assert!(pick(&USUAL, Some("Q4_K")).unwrap_err().contains("no file is, or has, 'Q4_K'"));
        assert_eq!(pick(&["m.q4_0.gguf", "m.q4_0_4_4.gguf"], Some("Q4_0")).unwrap(), "m.q4_0.gguf");
    }

    #[test]
    fn a_quant_that_there_is_not_is_answered_with_those_that_there_are() {
        let error = pick(&USUAL, Some("Q6_K")).unwrap_err();
        for says in ["'Q6_K'", "Q2_K (m-Q2_K.gguf)", "Q8_0 (m-Q8_0.gguf)", "such as hf:a/b:Q2_K"] {
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn the_quantisation_is_read_out_of_a_name() {
        for (file, quant) in [
            ("Qwen3-8B-Q4_K_M.gguf", Some("Q4_K_M")),
            ("BF16/m.gguf", Some("BF16")),
            ("m.q8_0.gguf", Some("q8_0")),
            ("m-UD-IQ2_XXS.gguf", Some("UD-IQ2_XXS")),
            ("gpt-oss-20b-mxfp4.gguf", Some("mxfp4")),
            ("Q4/m-Q5_K_S.gguf", Some("Q5_K_S")),
            ("Qwen3-8B.gguf", None),
            ("q9_0-Q0-q44.gguf", None),
            ("", None),
        ] {
            assert_eq!(quantization(file).as_deref(), quant, "{file}");
        }
    }

    #[test]
    fn a_file_can_be_named() {
        assert_eq!(pick(&USUAL, Some("m-Q2_K.gguf")).unwrap(), "m-Q2_K.gguf");
        assert_eq!(pick(&["x/m.gguf", "y/n.gguf"], Some("y/n.gguf")).unwrap(), "y/n.gguf");
    }

    #[test]
    fn the_plain_quant_wins_over_the_dynamic_one_unless_that_was_asked_for() {
        let files = ["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"];
        assert_eq!(pick(&files, Some("Q4_K_M")).unwrap(), "m-Q4_K_M.gguf");
        assert_eq!(pick(&files, Some("UD-Q4_K_M")).unwrap(), "m-UD-Q4_K_M.gguf");
    }

    #[test]
    fn several_models_in_one_repository_are_not_guessed_between() {
        let error = pick(&["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], None).unwrap_err();
        assert!(error.contains("hf:a/b:a-Q4_K_M.gguf"), "{error}");
    }

    #[test]
    fn of_a_model_in_several_files_the_first_stands_for_all_if_all_are_there() {
        let [first, second] = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"];
        for wanted in [None, Some("Q8_0"), Some(first), Some(second), Some("m-Q8_0-00002-of-00002.gguf")] {
            assert_eq!(pick(&[second, first], wanted).unwrap(), first, "{wanted:?}");
        }
        assert_eq!(pick(&[first, second, "m-Q4_0.gguf"], None).unwrap(), "m-Q4_0.gguf");
        assert!(pick(&[second], Some("Q8_0")).unwrap_err().contains("of Q8_0 only some parts are there"));
        assert!(pick(&[first], None).unwrap_err().contains("only some parts"));
        assert_eq!(pick(&[first, "m-Q4_0.gguf"], None).unwrap(), "m-Q4_0.gguf");
    }

    #[test]
    fn a_repository_without_models_is_told() {
        assert!(pick(&["README.md", "mmproj-f16.gguf"], None).unwrap_err().contains("no GGUF model"));
    }

    #[test]
    fn part_numbers_are_read_from_the_end_of_the_name() {
        let part = split_part("q/m-00002-of-00003.gguf").unwrap();
        assert_eq!((part.number, part.count, part.joined()), (2, 3, "q/m.gguf".to_owned()));
        assert_eq!(part.all(), ["q/m-00001-of-00003.gguf", "q/m-00002-of-00003.gguf", "q/m-00003-of-00003.gguf"]);
        for whole in [
            "m.gguf",
            "m-of-00010.gguf",
            "m-0002-of-0010.gguf",
            "of-00010.gguf",
            ".gguf",
            "",
            "é-00001-of-0000é.gguf",
            "m-00001-of-00001.gguf",
            "m-00000-of-00002.gguf",
            "m-00003-of-00002.gguf",
            "m-00001-of-99999.gguf",
        ] {
            assert_eq!(split_part(whole), None, "{whole}");
        }
    }

    proptest! {
        #[test]
        fn no_list_of_names_makes_the_choice_panic(files in proptest::collection::vec("\\PC{0,40}(\\.gguf)?", 0..20), wanted in proptest::option::of("\\PC{0,20}")) {
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            let _ = choose(&files, wanted.as_deref(), "hf:a/b", "https://hub");
            let _ = files.into_iter().map(quantization).count();
        }
    }
}
