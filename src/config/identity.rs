//! The settings that say who is let in.

use std::collections::BTreeSet;

use super::{Config, ConfigError};
use crate::auth::issuers::IssuerConfig;
use crate::auth::jwt::{Key, Verifier};
use crate::auth::sessions::SessionsConfig;
use crate::outbound::address::Target;

impl Config {
    /// What is wrong with those that do not go together.
    pub(super) fn check_identity(&self) -> Result<(), ConfigError> {
        if self.jwt_secret.is_some() && self.jwt_key.is_some() {
            return Err(ConfigError::new(
                "give --jwt-secret or --jwt-key, not both: the key decides which algorithms are accepted",
            ));
        }
        if self.jwt_key.is_some() && !self.jwks_url.is_empty() {
            return Err(ConfigError::new(
                "give --jwt-key or --jwks-url, not both: whose key a token is signed with could not be told",
            ));
        }
        if self.introspect_client_id.is_some() != self.introspect_client_secret.is_some() {
            return Err(ConfigError::new(
                "give both --introspect-client-id and --introspect-client-secret, or neither",
            ));
        }
        self.sessions()?;

        let issuers = self.issuers()?;
        let mut names = BTreeSet::new();
        for issuer in &issuers {
            match &issuer.issuer {
                None if issuers.len() > 1 => {
                    return Err(ConfigError::new("--jwks-url: of several, each needs its issuer: ISSUER=URL"));
                }
                Some(name) if !names.insert(name) => {
                    return Err(ConfigError::new(format!("--jwks-url: two are of the issuer {name}")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The issuers whose keys are fetched.
    pub fn issuers(&self) -> Result<Vec<IssuerConfig>, ConfigError> {
        let parse = |url: &String| IssuerConfig::parse(url, self.jwt_issuer.as_deref(), &self.private_hosts);
        let issuers = self.jwks_url.iter().map(parse).collect::<Result<_, _>>();
        issuers.map_err(|why| ConfigError::new(format!("--jwks-url {why}")))
    }

    /// How sessions are checked, if there are any.
    pub fn sessions(&self) -> Result<Option<SessionsConfig>, ConfigError> {
        let Some(url) = &self.introspect_url else { return Ok(None) };
        let target = Target::configured(url, &self.private_hosts)
            .map_err(|why| ConfigError::new(format!("--introspect-url {why}")))?;
        let client = self.introspect_client_id.clone().zip(self.introspect_client_secret.clone());
        Ok(Some(SessionsConfig { target, client, audience: self.jwt_audience.clone() }))
    }

    /// The verifier of tokens with the key that is configured, if one is. An error if nothing lets anybody in: `serve`
    /// refuses to start.
    pub fn verifier(&self) -> Result<Option<Verifier>, ConfigError> {
        let key = match (&self.jwt_secret, &self.jwt_key) {
            (Some(secret), _) => Key::Secret(secret.clone()),
            (None, Some(file)) => {
                let pem = std::fs::read(file);
                Key::Pem(pem.map_err(|error| ConfigError::new(format!("--jwt-key {}: {error}", file.display())))?)
            }
            (None, None) if !self.jwks_url.is_empty() || self.introspect_url.is_some() => return Ok(None),
            (None, None) => {
                return Err(ConfigError::new(
                    "nobody could be let in: give --jwt-secret, --jwt-key, --jwks-url, --introspect-url or --dev",
                ));
            }
        };
        let verifier = Verifier::new(&key, self.jwt_issuer.as_deref(), self.jwt_audience.as_deref());
        verifier.map(Some).map_err(ConfigError::new)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ServeArgs;
    use super::*;

    fn load(given: ServeArgs) -> Result<Config, String> {
        Config::load(None, &given).map_err(|error| error.to_string())
    }

    fn with_keys(urls: &[&str], more: ServeArgs) -> Result<Config, String> {
        load(ServeArgs { jwks_url: Some(urls.iter().map(|url| (*url).to_owned()).collect()), ..more })
    }

    #[test]
    fn each_of_several_issuers_has_a_name_of_its_own() {
        let names = |urls: &[&str]| {
            let config = with_keys(urls, ServeArgs::default())?;
            let issuers = config.issuers().map_err(|error| error.to_string())?;
            Ok::<_, String>(issuers.into_iter().map(|it| it.issuer.unwrap_or_default()).collect::<Vec<_>>())
        };
        let described = "https://b.example/.well-known/openid-configuration";
        assert_eq!(names(&["a=https://a.example/keys", described]), Ok(vec!["a".into(), "https://b.example".into()]));
        assert_eq!(names(&["https://a.example/keys"]), Ok(vec![String::new()]));
        let why = names(&["https://a.example/keys", described]).expect_err("which tokens are whose?");
        assert_eq!(why, "--jwks-url: of several, each needs its issuer: ISSUER=URL");
        let why = names(&[described, described]).expect_err("the same twice");
        assert_eq!(why, "--jwks-url: two are of the issuer https://b.example");
    }

    #[test]
    fn a_url_that_leads_where_it_must_not_is_refused_by_the_name_of_its_setting() {
        let plain = "http://auth.example/keys";
        let why = with_keys(&[plain], ServeArgs::default()).expect_err("http").to_string();
        assert!(
            why.starts_with("--jwks-url http://auth.example/keys: http:// is for private addresses alone"),
            "{why}"
        );
        let private_hosts = Some(vec!["auth.example".to_owned()]);
        assert!(with_keys(&[plain], ServeArgs { private_hosts, ..ServeArgs::default() }).is_ok());
        let given = ServeArgs { introspect_url: Some("auth".to_owned()), ..ServeArgs::default() };
        let why = load(given).expect_err("no URL");
        assert!(why.starts_with("--introspect-url must be a URL such as"), "{why}");
    }

    #[test]
    fn settings_of_which_one_would_not_be_used_are_refused() {
        let jwt_key = Some("k.pem".into());
        assert!(with_keys(&["https://a.example/"], ServeArgs { jwt_key, ..ServeArgs::default() }).is_err());
        let given = ServeArgs { introspect_client_id: Some("weft".to_owned()), ..ServeArgs::default() };
        let why = load(given).expect_err("no secret");
        assert_eq!(why, "give both --introspect-client-id and --introspect-client-secret, or neither");
    }

    #[test]
    fn somebody_can_be_let_in_or_the_server_does_not_start() {
        let verifier = |config: &Config| config.verifier().map(|verifier| verifier.is_some());
        let why = verifier(&Config::default()).expect_err("nobody").to_string();
        assert!(why.starts_with("nobody could be let in"), "{why}");
        let config = Config { introspect_url: Some("https://a.example/".into()), ..Config::default() };
        assert_eq!(verifier(&config).ok(), Some(false));
        let jwt_secret = Some("a secret that is long enough for it".to_owned());
        assert_eq!(verifier(&Config { jwt_secret, ..config }).ok(), Some(true));
    }
}
