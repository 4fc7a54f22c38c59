//! Whether the topics keep what they are given: their settings on the brokers, judged at the start and then again and
//! again, since anybody with the right to can change them.
//!
//! A problem is what deletes records, or will. A warning is what may lose them together with a broker; for development, on
//! one broker, that is as it should be.

use std::collections::HashMap;
use std::fmt;

use rdkafka::admin::{OwnedResourceSpecifier, ResourceSpecifier};
use rdkafka::error::KafkaError;

use super::admin::{admin_client, admin_options, block_on};
use super::client::Connection;
use super::topics::Topics;
use crate::log::Topic;

/// With how many replicas a record survives the loss of a broker, and the service as well.
pub(super) const REPLICAS: u32 = 3;
/// With that many replicas: how many have an event before it is answered.
pub(super) const IN_SYNC: u32 = 2;

/// What was found of one topic.
pub(super) struct TopicFacts {
    pub(super) topic: Topic,
    pub(super) name: String,
    /// Empty when the brokers do not say.
    pub(super) settings: HashMap<String, String>,
    /// The fewest of any partition; 0 when it is not known.
    pub(super) replicas: u32,
}

/// What is not as it should be, and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub what: String,
    pub mend: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}. To mend it: {}", self.what, self.mend)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Findings {
    pub(super) problems: Vec<Finding>,
    pub(super) warnings: Vec<Finding>,
    /// Records that were deleted while the server runs.
    pub(super) deleted: Vec<String>,
    /// How many replicas of each topic have to be in sync for it to take a record; 0 when it is not known.
    pub(super) in_sync: [u32; Topic::ALL.len()],
}

/// The settings of each topic by its name, as the brokers say them.
pub(super) type Settings = HashMap<String, HashMap<String, String>>;

pub(super) fn ask(connection: &Connection, topics: &Topics) -> Result<Settings, KafkaError> {
    let wanted = Topic::ALL.map(|topic| ResourceSpecifier::Topic(topics.name(topic)));
    let admin = admin_client(connection)?;
    let found = block_on(admin.describe_configs(&wanted, &admin_options()))?;
    let settings = found.into_iter().flatten().filter_map(|found| {
        let OwnedResourceSpecifier::Topic(name) = found.specifier else { return None };
        Some((name, found.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))).collect()))
    });
    Ok(settings.collect())
}

/// Judges the topics' settings; `replicas` are those of each topic.
pub(super) fn check(
    connection: &Connection,
    topics: &Topics,
    mut settings: Settings,
    replicas: [u32; Topic::ALL.len()],
) -> Findings {
    let facts = Topic::ALL.map(|topic| {
        let name = topics.name(topic).to_owned();
        let settings = settings.remove(&name).unwrap_or_default();
        TopicFacts { topic, name, settings, replicas: replicas[topic as usize] }
    });
    let mut findings = judge(&facts, &connection.config.brokers);
    findings.warnings.extend(connection.warnings().into_iter().map(|what| Finding {
        what,
        mend: "take that setting away, and name the authority that issued them with ssl.ca.location".to_owned(),
    }));
    findings
}

/// Pure: the facts come in, the findings go out. `brokers` are named in what mends a problem.
pub(super) fn judge(facts: &[TopicFacts], brokers: &str) -> Findings {
    let mut findings = Findings::default();
    // Topics with the same warning share its line.
    let mut warnings: Vec<(Warning, Vec<&str>)> = Vec::new();
    for it in facts {
        findings.problems.extend(problems(it, brokers));
        findings.in_sync[it.topic as usize] = it.number("min.insync.replicas");
        for warning in it.warnings() {
            match warnings.iter_mut().find(|(known, _)| *known == warning) {
                Some((_, names)) => names.push(&it.name),
                None => warnings.push((warning, vec![&it.name])),
            }
        }
    }
    let finding = |((text, mend), names): (Warning, Vec<&str>)| Finding {
        what: format!("{}: {text}", names.join(", ")),
        mend: match mend {
            Mend::Setting(name, value) => {
                let commands: Vec<String> = names.iter().map(|topic| alter(brokers, topic, name, value)).collect();
                commands.join("; ")
            }
            Mend::Words(words) => words.to_owned(),
        },
    };
    findings.warnings = warnings.into_iter().map(finding).collect();
    findings
}

/// What may go wrong, and how to mend it.
type Warning = (String, Mend);

#[derive(Debug, PartialEq, Eq)]
enum Mend {
    /// By another value of a topic's setting.
    Setting(&'static str, &'static str),
    Words(&'static str),
}

/// The command that gives a topic another setting.
fn alter(brokers: &str, topic: &str, setting: &str, value: &str) -> String {
    format!(
        "kafka-configs.sh --bootstrap-server {brokers} --alter --entity-type topics --entity-name {topic} --add-config \
         {setting}={value}"
    )
}

const MORE_REPLICAS: Mend = Mend::Words(
    "give its partitions 3 replicas each with kafka-reassign-partitions.sh, on as many brokers; for development one is enough",
);

/// What deletes events or dead letters. Of receipts the newest of each key is enough.
fn problems(it: &TopicFacts, brokers: &str) -> Vec<Finding> {
    if it.topic == Topic::Receipts || it.settings.is_empty() {
        return Vec::new();
    }
    let problem = |setting: &str, does: &str, mended: &str| {
        let (name, value) = (&it.name, it.setting(setting));
        let what = format!("{name} {does} ({setting}={value}), and Weft keeps its records for ever");
        Finding { what, mend: alter(brokers, name, setting, mended) }
    };
    let mut problems = Vec::new();
    if it.setting("cleanup.policy").contains("compact") {
        problems.push(problem("cleanup.policy", "forgets all but the newest record of a key", "delete"));
    }
    if it.setting("cleanup.policy").contains("delete") {
        let finite = ["retention.ms", "retention.bytes"].into_iter().filter(|setting| it.setting(setting) != "-1");
        problems.extend(finite.map(|setting| problem(setting, "deletes old records", "-1")));
    }
    problems
}

impl TopicFacts {
    fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> u32 {
        self.setting(name).parse().unwrap_or(0)
    }

    fn warnings(&self) -> Vec<Warning> {
        let (replicas, in_sync) = (self.replicas, self.number("min.insync.replicas"));
        let mut warnings = Vec::new();
        match replicas {
            0 | REPLICAS.. => {}
            1 => {
                let what = "1 replica: what was answered is gone with its broker's disk";
                warnings.push((what.to_owned(), MORE_REPLICAS));
            }
            _ => {
                let what =
                    format!("{replicas} replicas: with {REPLICAS}, losing a broker loses neither events nor service");
                warnings.push((what, MORE_REPLICAS));
            }
        }
        if self.settings.is_empty() {
            warnings.push((
                "the brokers do not say how the topic is set up; it must keep every record".to_owned(),
                Mend::Words("give Weft's user the right DescribeConfigs on its topics"),
            ));
            return warnings;
        }
        let in_sync_is_2 = Mend::Setting("min.insync.replicas", "2");
        if replicas > 1 && in_sync == 1 {
            let what = "min.insync.replicas is 1: an event that only one broker has is answered as durable";
            warnings.push((what.to_owned(), in_sync_is_2));
        } else if replicas > 1 && in_sync >= replicas {
            let what =
                format!("min.insync.replicas is {in_sync} of {replicas}: without any one broker nothing is appended");
            warnings.push((what, if replicas > IN_SYNC { in_sync_is_2 } else { MORE_REPLICAS }));
        }
        if self.setting("unclean.leader.election.enable") == "true" {
            let what = "unclean.leader.election.enable is true: a broker without the newest events may be made leader, and \
                        they are gone";
            warnings.push((what.to_owned(), Mend::Setting("unclean.leader.election.enable", "false")));
        }
        if self.topic == Topic::Receipts {
            let policy = self.setting("cleanup.policy");
            if policy != "compact" {
                let what = format!("cleanup.policy is {policy}: receipts should be compacted, and nothing else");
                warnings.push((what, Mend::Setting("cleanup.policy", "compact")));
            }
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A topic as Weft makes it on three brokers, but for `changed`.
    fn facts(topic: Topic, replicas: u32, changed: &[(&str, &str)]) -> TopicFacts {
        let policy = if topic == Topic::Receipts { "compact" } else { "delete" };
        let usual = [
            ("cleanup.policy", policy),
            ("retention.ms", "-1"),
            ("retention.bytes", "-1"),
            ("min.insync.replicas", "2"),
            ("unclean.leader.election.enable", "false"),
        ];
        let settings = usual.iter().chain(changed).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        TopicFacts { topic, name: format!("weft.{}", topic.as_str()), settings: settings.collect(), replicas }
    }

    fn all(replicas: u32, changed: &[(&str, &str)]) -> Findings {
        judge(&Topic::ALL.map(|topic| facts(topic, replicas, changed)), "k:1")
    }

    #[test]
    fn topics_as_weft_makes_them_on_three_brokers_are_fine() {
        assert_eq!(all(3, &[]), Findings { in_sync: [2; 3], ..Findings::default() });
    }

    #[test]
    fn whatever_deletes_events_or_dead_letters_is_a_problem_and_says_how_to_mend_it() {
        for (setting, value, mended) in [
            ("retention.ms", "604800000", "retention.ms=-1"),
            ("retention.bytes", "1000000", "retention.bytes=-1"),
            ("cleanup.policy", "compact", "cleanup.policy=delete"),
            ("cleanup.policy", "compact,delete", "cleanup.policy=delete"),
        ] {
            for topic in [Topic::Events, Topic::DeadLetters] {
                let findings = judge(&[facts(topic, 3, &[(setting, value)])], "k:1");
                let [problem] = &findings.problems[..] else { panic!("{findings:?}") };
                let name = format!("weft.{}", topic.as_str());
                assert!(
                    problem.what.contains(&name) && problem.what.contains(&format!("{setting}={value}")),
                    "{problem}"
                );
                for part in [&*name, mended, "--bootstrap-server k:1"] {
                    assert!(problem.mend.contains(part), "{problem}");
                }
            }
        }
        // A topic that is only compacted deletes nothing for its age.
        let compacted =
            judge(&[facts(Topic::Events, 3, &[("cleanup.policy", "compact"), ("retention.ms", "1")])], "k:1");
        assert_eq!(compacted.problems.len(), 1, "{compacted:?}");
    }

    #[test]
    fn receipts_need_only_the_newest_of_a_key() {
        let findings = judge(&[facts(Topic::Receipts, 3, &[("retention.ms", "1")])], "k:1");
        assert_eq!((findings.problems.len(), findings.warnings.len()), (0, 0), "{findings:?}");
        let findings = judge(&[facts(Topic::Receipts, 3, &[("cleanup.policy", "delete")])], "k:1");
        assert!(findings.problems.is_empty() && findings.warnings[0].what.contains("compacted"), "{findings:?}");
    }

    #[test]
    fn what_may_be_lost_with_a_broker_is_a_warning_and_topics_alike_share_it() {
        let warned = |replicas, changed: &[(&str, &str)]| {
            let findings = all(replicas, changed);
            assert!(findings.problems.is_empty(), "{findings:?}");
            findings.warnings
        };
        let texts = |warnings: Vec<Finding>| warnings.into_iter().map(|it| it.what).collect::<Vec<_>>();
        assert_eq!(
            texts(warned(1, &[("min.insync.replicas", "1")])),
            [
                "weft.events, weft.receipts, weft.dead-letters: 1 replica: what was answered is gone with its broker's disk"
            ]
        );
        assert_eq!(warned(2, &[("min.insync.replicas", "1")]).len(), 2);
        for (setting, value, what, mended) in [
            ("min.insync.replicas", "1", "min.insync.replicas is 1", "min.insync.replicas=2"),
            ("min.insync.replicas", "3", "without any one broker", "min.insync.replicas=2"),
            ("unclean.leader.election.enable", "true", "is true", "unclean.leader.election.enable=false"),
        ] {
            let [warning] = &warned(3, &[(setting, value)])[..] else { panic!("{setting}") };
            assert!(warning.what.contains(what), "{warning}");
            assert_eq!(warning.mend.matches(mended).count(), 3, "a command for each topic: {warning}");
            assert!(warning.mend.contains("--entity-name weft.dead-letters"), "{warning}");
        }
        // Fewer would be no majority: what helps is one replica more.
        assert!(warned(2, &[])[1].mend.contains("kafka-reassign-partitions.sh"));
    }

    #[test]
    fn settings_that_the_brokers_do_not_say_are_a_warning() {
        let silent = Topic::ALL.map(|topic| TopicFacts { settings: HashMap::new(), ..facts(topic, 3, &[]) });
        let findings = judge(&silent, "k:1");
        assert!(findings.problems.is_empty() && findings.warnings.len() == 1, "{findings:?}");
        assert!(findings.warnings[0].what.contains("do not say"), "{findings:?}");
    }
}
