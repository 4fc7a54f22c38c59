//! A set of public keys (RFC 7517): which of them can be used, and for what.
//!
//! A key says by its kind, and by its `alg` if it has one, which algorithms it is for; a token never does. A key that Weft
//! does not know, that is not for signatures, or that is no public one is passed over, as the RFC wants it.

use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use super::jwt::VerifyingKey;

/// Keys of a set that are looked at.
const MAX_KEYS: usize = 100;
/// Bytes of the modulus of the weakest RSA key: 2,048 bits (RFC 7518, section 3.3).
const MIN_RSA_BYTES: usize = 256;

/// Keys by their names.
pub struct KeySet(Vec<(Option<String>, VerifyingKey)>);

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

impl KeySet {
    /// Reads a set that has at least one key of use.
    pub fn parse(body: &[u8]) -> Result<KeySet, String> {
        let document: Document =
            serde_json::from_slice(body).map_err(|_| "it is no set of keys in JSON (RFC 7517)".to_owned())?;
        if document.keys.len() > MAX_KEYS {
            return Err(format!("the set has {} keys; at most {MAX_KEYS} may be", document.keys.len()));
        }
        let keys: Vec<_> = document.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() { Err("the set has no key of use".to_owned()) } else { Ok(KeySet(keys)) }
    }

    /// The key for a token with this header. A token without `kid` is the only key's, if there is only one.
    pub fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&VerifyingKey> {
        let is_for = |key: &VerifyingKey| key.algorithms().contains(&algorithm);
        match (kid, &self.0[..]) {
            (Some(kid), keys) => {
                keys.iter().find(|(name, key)| name.as_deref() == Some(kid) && is_for(key)).map(|(_, key)| key)
            }
            (None, [(_, only)]) => Some(only).filter(|key| is_for(key)),
            (None, _) => None,
        }
    }

    /// Whether a key has this name, whatever it is for.
    pub fn has(&self, kid: Option<&str>) -> bool {
        match kid {
            Some(kid) => self.0.iter().any(|(name, _)| name.as_deref() == Some(kid)),
            None => true,
        }
    }
}

/// A key with its name, if it is one that signatures can be verified with.
fn usable(value: Value) -> Option<(Option<String>, VerifyingKey)> {
    let is_for_signatures = value.get("use").is_none_or(|it| it == "sig")
        && value.get("key_ops").is_none_or(|it| it.as_array().is_some_and(|all| all.iter().any(|it| it == "verify")));
    if !is_for_signatures {
        return None;
    }
    let kid = value.get("kid").and_then(Value::as_str).map(str::to_owned);
    let alg = match value.get("alg") {
        Some(alg) => Some(Algorithm::from_str(alg.as_str()?).ok()?),
        None => None,
    };
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let mut algorithms = algorithms(&jwk.algorithm)?;
    if let Some(alg) = alg {
        algorithms.retain(|it| *it == alg);
    }
    if algorithms.is_empty() {
        return None;
    }
    Some((kid, VerifyingKey::new(DecodingKey::from_jwk(&jwk).ok()?, algorithms)))
}

/// What keys of a kind are for. Secrets in a set that anybody can fetch are none.
fn algorithms(key: &AlgorithmParameters) -> Option<Vec<Algorithm>> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    match key {
        AlgorithmParameters::RSA(rsa) => {
            let modulus = BASE64_URL_SAFE_NO_PAD.decode(&rsa.n).ok()?;
            let strong = modulus.iter().skip_while(|byte| **byte == 0).count() >= MIN_RSA_BYTES;
            strong.then(|| vec![RS256, RS384, RS512, PS256, PS384, PS512])
        }
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => Some(vec![ES256]),
            EllipticCurve::P384 => Some(vec![ES384]),
            _ => None,
        },
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Some(vec![EdDSA]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Of RFC 8037, appendix A.
    fn ed(kid: &str) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"})
    }

    fn rsa(bytes: usize) -> Value {
        json!({"kty": "RSA", "kid": "r", "e": "AQAB", "n": BASE64_URL_SAFE_NO_PAD.encode(vec![0xc5; bytes])})
    }

    fn parse(keys: Value) -> Result<KeySet, String> {
        KeySet::parse(json!({"keys": keys}).to_string().as_bytes())
    }

    fn with(mut key: Value, name: &str, value: Value) -> Value {
        key[name] = value;
        key
    }

    #[test]
    fn a_key_is_found_by_its_name_and_only_for_its_own_algorithms() {
        let set = parse(json!([ed("a"), rsa(256), {"kty": "unheard-of", "kid": "u"}])).expect("two keys");
        assert!(set.find(Some("a"), Algorithm::EdDSA).is_some());
        assert!(set.find(Some("a"), Algorithm::HS256).is_none() && set.find(Some("r"), Algorithm::EdDSA).is_none());
        assert!(set.find(Some("r"), Algorithm::PS512).is_some());
        assert!(set.find(None, Algorithm::EdDSA).is_none(), "which of the two?");
        assert!(set.has(Some("a")) && !set.has(Some("u")));
        let one = parse(json!([with(rsa(256), "alg", json!("RS256"))])).expect("one key");
        assert!(one.find(None, Algorithm::RS256).is_some() && one.find(None, Algorithm::RS384).is_none(), "pinned");
    }

    #[test]
    fn what_is_no_public_key_for_signatures_is_passed_over_and_a_set_of_such_is_refused() {
        let secret = json!({"kty": "oct", "kid": "s", "k": BASE64_URL_SAFE_NO_PAD.encode([7; 64]), "alg": "HS256"});
        for key in [
            secret,
            rsa(128),
            with(ed("a"), "use", json!("enc")),
            with(ed("a"), "key_ops", json!(["sign"])),
            with(ed("a"), "alg", json!("HS256")),
            with(ed("a"), "alg", json!("none")),
            with(ed("a"), "x", json!("!")),
            json!(7),
        ] {
            assert!(parse(json!([key.clone()])).is_err(), "{key}");
        }
        assert!(parse(json!([])).is_err());
        assert!(parse(json!(vec![ed("a"); 101])).is_err(), "too many");
        for body in ["", "<html>", "{}", "[]", "{\"keys\": 1}"] {
            assert!(KeySet::parse(body.as_bytes()).is_err(), "{body}");
        }
    }
}
