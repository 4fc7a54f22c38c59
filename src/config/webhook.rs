//! The settings of the webhook.

use super::{Config, ConfigError};
use crate::outbound::address::Target;
use crate::protocol::kinds::{KindClass, MEMBER_ADDED, MEMBER_REMOVED, THREAD_CREATED, THREAD_UPDATED, classify};
use crate::protocol::work::GroupSettings;
use crate::webhook::{Secret, WebhookConfig};

impl Config {
    /// The backend that is told of events, if there is one.
    pub fn webhook(&self) -> Result<Option<WebhookConfig>, ConfigError> {
        let Some(url) = &self.webhook_url else { return Ok(None) };
        let target = Target::configured(url, &self.private_hosts)
            .map_err(|why| ConfigError::new(format!("--webhook-url {why}")))?;
        let kinds = self.webhook_kinds.clone();
        if let Some(kind) = kinds.iter().find(|kind| !is_event(kind)) {
            return Err(ConfigError::new(format!("--webhook-kinds: there are no events of the kind {kind:.60}")));
        }
        GroupSettings { kinds: kinds.clone(), ..GroupSettings::default() }
            .check()
            .map_err(|error| ConfigError::new(format!("--webhook-kinds: {}", error.message)))?;
        let secrets: Result<Vec<_>, _> = self.webhook_secret.iter().map(|secret| Secret::parse(secret)).collect();
        let secrets = secrets.map_err(|why| ConfigError::new(format!("--webhook-secret {why}")))?;
        if secrets.is_empty() {
            let why = "--webhook-url wants --webhook-secret: without it the backend cannot tell who calls it";
            return Err(ConfigError::new(why));
        }
        Ok(Some(WebhookConfig { target, kinds, secrets }))
    }
}

/// Whether this is a kind of events that threads hold.
fn is_event(kind: &str) -> bool {
    matches!(kind, THREAD_CREATED | THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED)
        || classify(kind).is_ok_and(|class| !matches!(class, KindClass::Token))
}

#[cfg(test)]
mod tests {
    use super::super::ServeArgs;
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn webhook(url: &str, kinds: &[&str], secrets: &[&str]) -> Result<Config, String> {
        let all = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let given = ServeArgs {
            webhook_url: Some(url.to_owned()),
            webhook_kinds: (!kinds.is_empty()).then(|| all(kinds)),
            webhook_secret: Some(all(secrets)),
            ..ServeArgs::default()
        };
        Config::load(None, &given).map_err(|error| error.to_string())
    }

    #[test]
    fn a_backend_is_told_of_messages_unless_other_kinds_are_named() {
        let kinds = |named: &[&str]| {
            let config = webhook("https://app.example/weft", named, &[SECRET]).expect("good settings");
            config.webhook().expect("checked").expect("there is one").kinds
        };
        assert_eq!(kinds(&[]), ["user_message"]);
        assert_eq!(
            kinds(&["x.order", "agent_completed", "member_added"]),
            ["x.order", "agent_completed", "member_added"]
        );
    }

    #[test]
    fn what_cannot_work_is_refused_by_the_name_of_its_setting() {
        let refused = |url: &str, kinds: &[&str], secrets: &[&str]| webhook(url, kinds, secrets).expect_err("refused");
        let url = "https://app.example/weft";
        assert!(refused("app", &[], &[SECRET]).starts_with("--webhook-url must be a URL"));
        assert!(refused("http://app.example/", &[], &[SECRET]).starts_with("--webhook-url "), "not in the clear");
        for kind in ["user_mesage", "agent_token", "work_leased", "x."] {
            let why = refused(url, &["user_message", kind], &[SECRET]);
            assert_eq!(why, format!("--webhook-kinds: there are no events of the kind {kind}"));
        }
        assert!(refused(url, &[], &[]).starts_with("--webhook-url wants --webhook-secret"));
        let why = refused(url, &[], &["whsec_c2VjcmV0"]);
        assert!(why.starts_with("--webhook-secret must be whsec_") && !why.contains("c2VjcmV0"), "{why}");
    }
}
