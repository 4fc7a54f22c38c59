//! What counts as a word of a text, and in which form words are compared. Pure.
//!
//! A word is a run of letters, digits and their marks, in whichever script. Where a script has no spaces (Chinese, Japanese,
//! Thai and some more) each character is a word, so that a phrase of them is found anywhere. An emoji is a word too, with all
//! that is joined to it.
//!
//! Words are compared folded: NFKC, without case, accents and characters that nobody sees (marks of direction, soft hyphens).
//! Beside this exact form each has a stem, by the rules of one language.

use frostem::Stemmer;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// Characters of a word that count; what follows is not looked at.
pub const MAX_WORD: usize = 64;

/// A word of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// Where it stands in the text, in bytes.
    pub start: usize,
    pub end: usize,
    pub folded: String,
}

/// The words of a text, in order.
pub fn words(text: &str) -> Words<'_> {
    Words { text, at: 0 }
}

pub struct Words<'t> {
    text: &'t str,
    at: usize,
}

impl Iterator for Words<'_> {
    type Item = Word;

    fn next(&mut self) -> Option<Word> {
        loop {
            let rest = &self.text[self.at..];
            let start = self.at + rest.char_indices().find(|(_, c)| kind(*c).begins_word())?.0;
            let end = start + length(&self.text[start..]);
            self.at = end;
            let folded = fold(&self.text[start..end]);
            if !folded.is_empty() {
                return Some(Word { start, end, folded });
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A letter or digit of a script with spaces.
    Letter,
    /// A character that is a word by itself.
    Single,
    Emoji,
    /// Belongs to the character before it.
    Mark,
    /// Nobody sees it.
    Invisible,
    Other,
}

impl Kind {
    fn begins_word(self) -> bool {
        matches!(self, Kind::Letter | Kind::Single | Kind::Emoji)
    }
}

fn kind(c: char) -> Kind {
    match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' => Kind::Letter,
        '\0'..='\x7f' => Kind::Other,
        '\u{ad}' | '\u{61c}' | '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' => {
            Kind::Invisible
        }
        '\u{fe00}'..='\u{fe0f}' | '\u{feff}' => Kind::Invisible,
        '\u{2300}'..='\u{23ff}' | '\u{2600}'..='\u{27bf}' | '\u{2b00}'..='\u{2bff}' | '\u{1f000}'..='\u{1faff}' => {
            Kind::Emoji
        }
        _ if is_combining_mark(c) => Kind::Mark,
        _ if !c.is_alphanumeric() => Kind::Other,
        _ if is_without_spaces(c) => Kind::Single,
        _ => Kind::Letter,
    }
}

/// Whether the character is of a script that writes no spaces between words.
fn is_without_spaces(c: char) -> bool {
    matches!(c,
        '\u{e00}'..='\u{eff}' // Thai, Lao
        | '\u{1000}'..='\u{109f}' // Myanmar
        | '\u{1780}'..='\u{17ff}' // Khmer
        | '\u{3040}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' | '\u{ff66}'..='\u{ff9f}' // kana
        | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}') // Han
}

/// The length of the word at the beginning of a text.
fn length(text: &str) -> usize {
    let mut chars = text.char_indices();
    let Some((_, first)) = chars.next() else { return 0 };
    let mut end = first.len_utf8();
    match kind(first) {
        Kind::Letter => {
            for (at, c) in chars {
                match kind(c) {
                    Kind::Letter | Kind::Mark => end = at + c.len_utf8(),
                    // Counts if more of the word follows.
                    Kind::Invisible => {}
                    Kind::Single | Kind::Emoji | Kind::Other => break,
                }
            }
        }
        Kind::Emoji => {
            let mut before = first;
            for (at, c) in chars {
                let joined = before == '\u{200d}' && kind(c) == Kind::Emoji;
                let flag = is_regional(before) && is_regional(c) && at == first.len_utf8();
                if !(joined || flag || is_skin(c) || matches!(c, '\u{200d}' | '\u{fe0e}' | '\u{fe0f}')) {
                    break;
                }
                before = c;
                end = at + c.len_utf8();
            }
        }
        _ => {
            for (at, c) in chars {
                if !matches!(kind(c), Kind::Mark) {
                    break;
                }
                end = at + c.len_utf8();
            }
        }
    }
    end
}

fn is_regional(c: char) -> bool {
    matches!(c, '\u{1f1e6}'..='\u{1f1ff}')
}

fn is_skin(c: char) -> bool {
    matches!(c, '\u{1f3fb}'..='\u{1f3ff}')
}

/// The form in which a word is compared.
pub fn fold(word: &str) -> String {
    if word.is_ascii() {
        return word.bytes().take(MAX_WORD).map(|byte| byte.to_ascii_lowercase() as char).collect();
    }
    let composed = word.nfkc().flat_map(char::to_lowercase);
    let mut plain = String::with_capacity(word.len());
    for c in composed.nfd() {
        match c {
            'ß' => plain.push_str("ss"),
            'æ' => plain.push_str("ae"),
            'œ' => plain.push_str("oe"),
            'ø' => plain.push('o'),
            'ł' => plain.push('l'),
            'đ' => plain.push('d'),
            'ı' => plain.push('i'),
            'ς' => plain.push('σ'),
            _ if is_accent(c) || matches!(kind(c), Kind::Invisible | Kind::Other) => {}
            _ => plain.push(c),
        }
    }
    plain.nfc().take(MAX_WORD).collect()
}

/// Whether a mark is one that people leave out: accents of Latin, Greek and Cyrillic, the points of Hebrew and Arabic. Marks of
/// other scripts make another letter.
fn is_accent(c: char) -> bool {
    matches!(c,
        '\u{300}'..='\u{36f}' | '\u{1ab0}'..='\u{1aff}' | '\u{1dc0}'..='\u{1dff}' | '\u{20d0}'..='\u{20ff}' | '\u{fe20}'..='\u{fe2f}'
        | '\u{591}'..='\u{5bd}' | '\u{5bf}' | '\u{5c1}' | '\u{5c2}' | '\u{5c4}' | '\u{5c5}' | '\u{5c7}'
        | '\u{64b}'..='\u{65f}' | '\u{670}')
}

/// By which language's rules words have stems.
#[derive(Clone, Copy)]
pub struct Stems(Option<Stemmer>);

impl Stems {
    /// Without rules: a word's stem is the word.
    pub const PLAIN: Stems = Stems(None);

    /// `None` for a language without rules here.
    pub fn of(language: &str) -> Option<Stems> {
        match language {
            "plain" => Some(Stems::PLAIN),
            _ => Stemmer::try_from_name(language).ok().map(|stemmer| Stems(Some(stemmer))),
        }
    }

    /// The stem of a folded word.
    pub fn stem(&self, folded: &str) -> String {
        match &self.0 {
            Some(stemmer) => stemmer.stem(folded).into_owned(),
            None => folded.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> Vec<String> {
        words(text).map(|word| word.folded).collect()
    }

    #[test]
    fn words_are_letters_and_digits_without_case_and_accents() {
        assert_eq!(folded("Crème brûlée, 2 für Straße!"), ["creme", "brulee", "2", "fur", "strasse"]);
        assert_eq!(
            folded("snake_case foo-bar don't a.b@c.org"),
            ["snake", "case", "foo", "bar", "don", "t", "a", "b", "c", "org"]
        );
        assert_eq!(folded("Καλημέρας ΠΟΛΗΣ"), ["καλημερασ", "πολησ"]);
        assert_eq!(folded("ﬁne ＡＢＣ １２"), ["fine", "abc", "12"]);
        assert_eq!(folded("ëİıøŁđ"), ["eiiold"]);
        assert_eq!(folded("() -- \"' \u{200b}\u{200d}"), [""; 0]);
        assert_eq!(folded(""), [""; 0]);
    }

    #[test]
    fn composed_and_decomposed_text_is_alike_and_what_nobody_sees_does_not_count() {
        for text in ["é", "Ångström", "が", "한국어", "नमस्ते", "שָׁלוֹם", "مَرْحَبًا"]
        {
            let (nfc, nfd): (String, String) = (text.nfc().collect(), text.nfd().collect());
            assert_eq!(folded(&nfc), folded(&nfd), "{text}");
            assert!(!folded(text).is_empty(), "{text}");
        }
        assert_eq!(folded("שָׁלוֹם"), ["שלום"]);
        assert_eq!(folded("ab\u{200f}cd \u{202e}ef\u{202c} co\u{ad}op"), ["abcd", "ef", "coop"]);
    }

    #[test]
    fn scripts_without_spaces_are_read_character_by_character_and_keep_their_marks() {
        assert_eq!(folded("東京タワー"), ["東", "京", "タ", "ワ", "ー"]);
        assert_ne!(folded("が"), folded("か"));
        assert_eq!(folded("ok東京ok"), ["ok", "東", "京", "ok"]);
    }

    #[test]
    fn an_emoji_with_all_that_is_joined_to_it_is_a_word() {
        assert_eq!(folded("👨‍👩‍👧‍👦hi👍🏽 🇩🇪🇫🇷 ❤️").len(), 6);
        assert_eq!(folded("❤️"), folded("❤"));
        assert_ne!(folded("👨‍👩‍👧"), folded("👨"));
    }

    #[test]
    fn a_word_knows_where_it_stands() {
        let text = "Grüße, 東!";
        let places: Vec<&str> = words(text).map(|word| &text[word.start..word.end]).collect();
        assert_eq!(places, ["Grüße", "東"]);
    }

    #[test]
    fn a_long_word_counts_by_its_beginning() {
        let long = "x".repeat(500) + "y";
        assert_eq!(folded(&long), folded(&"x".repeat(64)));
        assert_eq!(fold(&"é".repeat(500)).chars().count(), MAX_WORD);
    }

    #[test]
    fn stems_are_by_the_rules_of_a_language() {
        let english = Stems::of("english").expect("it is there");
        assert_eq!((english.stem("running"), english.stem("runs")), ("run".to_owned(), "run".to_owned()));
        assert_eq!(Stems::of("plain").expect("it is there").stem("running"), "running");
        assert!(Stems::of("klingon").is_none());
    }
}
