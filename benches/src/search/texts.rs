//! The texts of a bench that searches: the same each time, with words of a Zipf distribution as those of people have.

/// How steeply words become rare.
const EXPONENT: f64 = 1.07;
/// Words of a text.
const SHORTEST: u64 = 5;
const LONGEST: u64 = 44;

/// Numbers that only look random (SplitMix64): the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of 0…below-1.
    pub fn below(&mut self, below: u64) -> u64 {
        self.next() % below.max(1)
    }

    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

pub struct Vocabulary {
    words: Vec<String>,
    /// Up to and with each word, how much of a text is made of them, in sum.
    shares: Vec<f64>,
}

impl Vocabulary {
    pub fn new(words: usize) -> Vocabulary {
        let mut sum = 0.0;
        let shares = (1..=words).map(|rank| {
            sum += (rank as f64).powf(-EXPONENT);
            sum
        });
        Vocabulary { shares: shares.collect(), words: (0..words).map(word).collect() }
    }

    fn word(&self, random: &mut Random) -> &str {
        let wanted = random.share() * self.shares.last().copied().unwrap_or_default();
        let at = self.shares.partition_point(|share| *share < wanted);
        self.words.get(at).map_or("", String::as_str)
    }

    /// The text of the event with this number.
    pub fn text(&self, number: u64) -> String {
        let mut random = Random::new(number);
        let words = SHORTEST + random.below(LONGEST - SHORTEST + 1);
        let words: Vec<&str> = (0..words).map(|_| self.word(&mut random)).collect();
        words.join(" ")
    }
}

/// The word with this number: syllables, a different word for each number.
fn word(number: usize) -> String {
    const CONSONANTS: &[u8] = b"bdfgklmnprtvz";
    const VOWELS: &[u8] = b"aiou";
    let syllables = CONSONANTS.len() * VOWELS.len();
    let (mut word, mut left) = (String::new(), number);
    loop {
        let syllable = left % syllables;
        word.push(char::from(CONSONANTS[syllable / VOWELS.len()]));
        word.push(char::from(VOWELS[syllable % VOWELS.len()]));
        match left / syllables {
            0 => return word,
            more => left = more - 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn words_differ_and_texts_are_the_same_each_time() {
        let vocabulary = Vocabulary::new(50_000);
        assert_eq!(vocabulary.words.iter().collect::<HashSet<_>>().len(), 50_000);
        let texts: Vec<String> = (0..1_000).map(|number| vocabulary.text(number)).collect();
        assert_eq!(texts, (0..1_000).map(|number| Vocabulary::new(50_000).text(number)).collect::<Vec<_>>());
        let lengths: HashSet<usize> = texts.iter().map(|text| text.split(' ').count()).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&5), Some(&44)));
        // By Zipf's law with this exponent and so many words, the first is about a tenth of all.
        let all = texts.iter().flat_map(|text| text.split(' ')).count();
        let first = texts.iter().flat_map(|text| text.split(' ')).filter(|word| *word == "ba").count();
        assert!((all / 15..all / 7).contains(&first), "{first} of {all}");
    }
}
