//! JSON Web Tokens (RFC 7519), verified with keys and algorithms from the configuration, never from the token.

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use super::Principal;
use super::claims::{Named, WhoseClaims};
use crate::clock;
use crate::protocol::error::{Code, Error};

/// Bytes that a shared secret has at least.
pub const MIN_SECRET: usize = 32;

/// The claims Weft writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub sub: String,
    pub tenant: String,
    /// Seconds since the Unix epoch.
    pub exp: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aud: Option<String>,
}

/// A key from the configuration; it decides the algorithms.
pub enum Key {
    /// HS256, HS384, HS512.
    Secret(String),
    /// A PEM public key: RSA (RS and PS), EC (ES256, ES384) or Ed25519 (EdDSA).
    Pem(Vec<u8>),
}

/// Refuses a secret that can be guessed: RFC 7518 wants as many bytes as HS256's hash has.
pub fn check_secret(secret: &str) -> Result<(), String> {
    if secret.len() >= MIN_SECRET {
        return Ok(());
    }
    Err(format!("must be at least {MIN_SECRET} bytes long, and has {}", secret.len()))
}

/// A key that tokens are verified with, and the algorithms that it is for: everything else in the library is switched off.
pub struct VerifyingKey {
    key: DecodingKey,
    signature: Validation,
}

impl VerifyingKey {
    /// `algorithms` are of one family, and there is one at least.
    pub fn new(key: DecodingKey, algorithms: Vec<Algorithm>) -> VerifyingKey {
        let mut signature = Validation::new(algorithms.first().copied().unwrap_or_default());
        signature.algorithms = algorithms;
        signature.required_spec_claims.clear();
        signature.validate_exp = false;
        signature.validate_nbf = false;
        signature.validate_aud = false;
        VerifyingKey { key, signature }
    }

    fn configured(key: &Key) -> Result<VerifyingKey, String> {
        let (key, algorithms) = match key {
            Key::Secret(secret) => {
                check_secret(secret).map_err(|why| format!("the JWT secret {why}"))?;
                let key = DecodingKey::from_secret(secret.as_bytes());
                (key, vec![Algorithm::HS256, Algorithm::HS384, Algorithm::HS512])
            }
            Key::Pem(pem) => public_key(pem)?,
        };
        Ok(VerifyingKey::new(key, algorithms))
    }

    pub fn algorithms(&self) -> &[Algorithm] {
        &self.signature.algorithms
    }

    /// Why the library refused a token.
    fn in_plain_words(&self, error: &jsonwebtoken::errors::Error) -> String {
        match error.kind() {
            ErrorKind::InvalidToken | ErrorKind::Base64(_) | ErrorKind::Utf8(_) => "the token is not a JWT".to_owned(),
            // An algorithm that the library does not know, `none` among them, is an error in the header's JSON.
            ErrorKind::Json(_) => "the token is not a JWT with a known algorithm and claims in JSON".to_owned(),
            ErrorKind::InvalidSignature => "the token's signature does not match the server's key".to_owned(),
            ErrorKind::InvalidAlgorithm => {
                let known: Vec<String> = self.signature.algorithms.iter().map(|it| format!("{it:?}")).collect();
                format!("the token's algorithm is not one of those of the server's key: {}", known.join(", "))
            }
            _ => "the token cannot be verified with the server's key".to_owned(),
        }
    }
}

/// What a token must say beside who it is for. Each is checked, and then required, when given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected<'a> {
    pub issuer: Option<&'a str>,
    pub audience: Option<&'a str>,
}

/// The user that a token stands for at the time `now`, in seconds since the Unix epoch. The library checks the signature; the
/// claims are checked here, so that a refusal says in plain words which claim it is about.
pub fn verify_with(key: &VerifyingKey, expected: Expected<'_>, token: &str, now: u64) -> Result<Principal, String> {
    let token =
        jsonwebtoken::decode::<Named>(token, &key.key, &key.signature).map_err(|error| key.in_plain_words(&error))?;
    check_header(&token.header)?;

    let claims = WhoseClaims::token(token.claims);
    let expires_at = claims.check_times(now)?.ok_or("the token's claim `exp` is missing")?;
    if let Some(issuer) = expected.issuer {
        claims.check_contains("iss", issuer)?;
    }
    if let Some(audience) = expected.audience {
        claims.check_contains("aud", audience)?;
    }
    claims.principal(expires_at)
}

/// Verifies tokens with the one key that is configured.
pub struct Verifier {
    key: VerifyingKey,
    issuer: Option<String>,
    audience: Option<String>,
}

impl Verifier {
    /// `issuer` and `audience` are checked, and then required, when given.
    pub fn new(key: &Key, issuer: Option<&str>, audience: Option<&str>) -> Result<Verifier, String> {
        let (issuer, audience) = (issuer.map(str::to_owned), audience.map(str::to_owned));
        Ok(Verifier { key: VerifyingKey::configured(key)?, issuer, audience })
    }

    /// Whether the key is for tokens with this algorithm.
    pub fn is_for(&self, algorithm: Algorithm) -> bool {
        self.key.algorithms().contains(&algorithm)
    }

    /// The user that a token stands for.
    pub fn verify(&self, token: &str) -> Result<Principal, Error> {
        self.verify_at(token, clock::now_s()).map_err(|why| Error::new(Code::Unauthenticated, why).at("token"))
    }

    /// As [`Verifier::verify`] at the time `now`, in seconds since the Unix epoch.
    fn verify_at(&self, token: &str, now: u64) -> Result<Principal, String> {
        let expected = Expected { issuer: self.issuer.as_deref(), audience: self.audience.as_deref() };
        verify_with(&self.key, expected, token, now)
    }
}

/// Refuses a token of another kind, and one with extensions that its issuer wants understood (RFC 7515, section 4.1.11).
fn check_header(header: &Header) -> Result<(), String> {
    if header.crit.is_some() {
        return Err("the token's header has `crit`: Weft understands no extensions".to_owned());
    }
    match &header.typ {
        Some(typ) if !["JWT", "at+jwt"].iter().any(|known| known.eq_ignore_ascii_case(typ)) => {
            Err(format!("the token's header `typ` is `{typ:.32}`, and must be `JWT`, `at+jwt` or absent"))
        }
        _ => Ok(()),
    }
}

/// The key in a PEM file and its algorithms. Tries each kind: the reader of a kind refuses keys of another.
fn public_key(pem: &[u8]) -> Result<(DecodingKey, Vec<Algorithm>), String> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    if let Ok(key) = DecodingKey::from_rsa_pem(pem) {
        return Ok((key, vec![RS256, RS384, RS512, PS256, PS384, PS512]));
    }
    if let Ok(key) = DecodingKey::from_ec_pem(pem) {
        return Ok((key, vec![ES256, ES384]));
    }
    match DecodingKey::from_ed_pem(pem) {
        Ok(key) => Ok((key, vec![EdDSA])),
        Err(_) => Err("the JWT key is not a PEM public key of kind RSA, EC or Ed25519".into()),
    }
}

/// Signs claims with a shared secret (HS256): for `weft token`, development and tests.
pub fn mint(secret: &str, claims: &Claims) -> Result<String, String> {
    jsonwebtoken::encode(&Header::default(), claims, &EncodingKey::from_secret(secret.as_bytes()))
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const SECRET: &str = "a secret that is long enough for it";
    const NOW: u64 = 1_700_000_000;

    fn verifier(issuer: Option<&str>, audience: Option<&str>) -> Verifier {
        Verifier::new(&Key::Secret(SECRET.into()), issuer, audience).expect("a good key")
    }

    fn signed(header: &Header, claims: &Value) -> String {
        jsonwebtoken::encode(header, claims, &EncodingKey::from_secret(SECRET.as_bytes())).expect("a token")
    }

    /// Good claims, with one of them changed; `null` is as good as absent.
    fn claims(name: &str, value: Value) -> Value {
        let mut claims = json!({"sub": "ada", "tenant": "acme", "exp": NOW + 600});
        claims[name] = value;
        claims
    }

    fn refusal(verifier: &Verifier, claims: &Value) -> String {
        verifier.verify_at(&signed(&Header::default(), claims), NOW).expect_err("a refusal")
    }

    #[test]
    fn a_refusal_says_which_claim_it_is_about() {
        let verifier = verifier(None, None);
        for (name, value, why) in [
            ("exp", Value::Null, "the token's claim `exp` is missing"),
            ("exp", json!("soon"), "the token's claim `exp` must be a number"),
            ("exp", json!(NOW - 31), "the token expired at 2023-11-14T22:12:49.000Z"),
            ("nbf", json!(NOW + 31), "the token is not valid before 2023-11-14T22:13:51.000Z"),
            ("nbf", json!([]), "the token's claim `nbf` must be a number"),
            ("iat", json!("now"), "the token's claim `iat` must be a number"),
            ("sub", Value::Null, "the token's claim `sub` is missing"),
            ("sub", json!(7), "the token's claim `sub` must be a string"),
            ("tenant", Value::Null, "the token's claim `tenant` is missing"),
            ("scope", json!(["publish"]), "the token's claim `scope` must be a string"),
            ("sub", json!("weft"), "the token's claim `sub` is `weft`, the name of the server's own user"),
        ] {
            assert_eq!(refusal(&verifier, &claims(name, value.clone())), why, "{name}: {value}");
        }
        for name in ["sub", "tenant"] {
            let why = refusal(&verifier, &claims(name, json!("a b")));
            assert!(why.contains(name) && why.contains("printable"), "{why}");
        }
    }

    #[test]
    fn issuer_and_audience_are_required_where_configured_and_may_be_lists() {
        let verifier = verifier(Some("us"), Some("weft"));
        let with = |iss: Value, aud: Value| {
            let mut claims = claims("iss", iss);
            claims["aud"] = aud;
            verifier.verify_at(&signed(&Header::default(), &claims), NOW).map(|who| who.user.to_string())
        };
        assert_eq!(with(json!("us"), json!("weft")), Ok("ada".to_owned()));
        assert_eq!(with(json!("us"), json!(["other", "weft"])), Ok("ada".to_owned()));
        assert_eq!(with(Value::Null, json!("weft")), Err("the token's claim `iss` is missing".to_owned()));
        assert_eq!(with(json!("them"), json!("weft")), Err("the token's claim `iss` is not `us`".to_owned()));
        assert_eq!(with(json!("us"), json!(["other"])), Err("the token's claim `aud` is not `weft`".to_owned()));
        assert_eq!(with(json!("us"), json!(1)), Err("the token's claim `aud` is not `weft`".to_owned()));
    }

    #[test]
    fn times_may_have_fractions() {
        let mut claims = claims("exp", json!(NOW as f64 + 0.5));
        claims["nbf"] = json!(NOW as f64 + 29.9);
        claims["iat"] = json!(NOW as f64 - 0.25);
        let who = verifier(None, None).verify_at(&signed(&Header::default(), &claims), NOW).expect("a good token");
        assert_eq!((who.expires_at, who.issued_at), (NOW, Some(NOW * 1_000 - 250)));
        let late = verifier(None, None).verify_at(&signed(&Header::default(), &claims), NOW + 31);
        assert_eq!(late.expect_err("late"), "the token expired at 2023-11-14T22:13:20.500Z");
        claims["exp"] = json!(1e300);
        let who = verifier(None, None).verify_at(&signed(&Header::default(), &claims), NOW).expect("a good token");
        assert_eq!(who.expires_at, u64::MAX);
    }

    #[test]
    fn a_token_of_another_kind_or_with_extensions_is_refused() {
        let verifier = verifier(None, None);
        let with = |header: &Header| verifier.verify_at(&signed(header, &claims("iat", json!(1))), NOW).map(drop);
        for typ in [None, Some("JWT"), Some("jwt"), Some("at+jwt"), Some("AT+JWT")] {
            assert_eq!(with(&Header { typ: typ.map(Into::into), ..Header::default() }), Ok(()), "{typ:?}");
        }
        for typ in ["", "dpop+jwt", "logout+jwt", "JWT "] {
            let why = with(&Header { typ: Some(typ.into()), ..Header::default() }).expect_err("another kind");
            assert!(why.contains(&format!("`typ` is `{typ}`")), "{why}");
        }
        for crit in [vec![], vec!["exp".to_owned()]] {
            let why = with(&Header { crit: Some(crit), ..Header::default() }).expect_err("an extension");
            assert!(why.contains("`crit`"), "{why}");
        }
    }

    #[test]
    fn what_is_not_a_token_of_this_key_is_refused_in_plain_words() {
        let verifier = verifier(None, None);
        let refusal = |token: &str| verifier.verify_at(token, NOW).expect_err("a refusal");
        assert_eq!(refusal(""), "the token is not a JWT");
        assert_eq!(refusal("nonsense"), "the token is not a JWT");
        let good = signed(&Header::default(), &claims("iat", json!(1)));
        let other = EncodingKey::from_secret(b"the secret of somebody else, as long");
        let foreign = jsonwebtoken::encode(&Header::default(), &claims("iat", json!(1)), &other).expect("a token");
        assert_eq!(refusal(&foreign), "the token's signature does not match the server's key");
        // {"alg":"none","typ":"JWT"}
        let (_, rest) = good.split_once('.').expect("three parts");
        let unsigned = refusal(&format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{rest}"));
        assert_eq!(unsigned, "the token is not a JWT with a known algorithm and claims in JSON");
        // {"alg":"RS256","typ":"JWT"}
        let public = refusal(&format!("eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.{rest}"));
        assert_eq!(public, "the token's algorithm is not one of those of the server's key: HS256, HS384, HS512");
        assert_eq!(
            refusal(&signed(&Header::default(), &json!([1]))),
            "the token is not a JWT with a known algorithm and claims in JSON"
        );
    }

    #[test]
    fn a_secret_that_is_too_short_makes_no_verifier() {
        let refused = |secret: &str| Verifier::new(&Key::Secret(secret.into()), None, None).map(drop);
        assert_eq!(refused("short"), Err("the JWT secret must be at least 32 bytes long, and has 5".to_owned()));
        assert!(refused(&"x".repeat(31)).is_err());
        assert_eq!(refused(&"x".repeat(32)), Ok(()));
    }
}
