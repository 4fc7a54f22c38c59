//! JSON Web Tokens (RFC 7519), verified with keys and algorithms from the configuration, never from the token.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use super::{Principal, Scopes};
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;

/// Seconds by which clocks may differ (`exp`, `nbf`).
pub const LEEWAY: u64 = 30;

/// The claims Weft reads and writes.
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

pub struct Verifier {
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    /// `issuer` and `audience` are checked, and then required, when given.
    pub fn new(key: &Key, issuer: Option<&str>, audience: Option<&str>) -> Result<Verifier, String> {
        let (key, algorithms) = match key {
            Key::Secret(secret) if secret.is_empty() => return Err("the JWT secret is empty".into()),
            Key::Secret(secret) => (
                DecodingKey::from_secret(secret.as_bytes()),
                vec![Algorithm::HS256, Algorithm::HS384, Algorithm::HS512],
            ),
            Key::Pem(pem) => public_key(pem)?,
        };
        let mut validation = Validation::new(algorithms[0]);
        validation.algorithms = algorithms;
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        let mut required = vec!["exp", "sub"];
        match audience {
            Some(audience) => {
                validation.set_audience(&[audience]);
                required.push("aud");
            }
            None => validation.validate_aud = false,
        }
        if let Some(issuer) = issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        Ok(Verifier { key, validation })
    }

    /// The user that a token stands for.
    pub fn verify(&self, token: &str) -> Result<Principal, Error> {
        /// `aud` may be a list, and other claims may have any shape: only these are ours.
        #[derive(Deserialize)]
        struct Wanted {
            sub: String,
            tenant: Option<String>,
            exp: u64,
            scope: Option<String>,
            iat: Option<f64>,
        }
        let refuse = |why: String| Error::new(Code::Unauthenticated, why).at("token");
        let claims = jsonwebtoken::decode::<Wanted>(token, &self.key, &self.validation)
            .map_err(|error| refuse(format!("the token is not valid: {error}")))?
            .claims;
        let tenant =
            claims.tenant.ok_or_else(|| refuse("the token is not valid: Missing required claim: tenant".into()))?;
        ids::check_name("sub", &claims.sub).map_err(|error| refuse(error.message.into_owned()))?;
        ids::check_name("tenant", &tenant).map_err(|error| refuse(error.message.into_owned()))?;
        let mut who = Principal::new(&tenant, &claims.sub, Scopes::parse(claims.scope.as_deref()), claims.exp);
        // RFC 7519 allows fractions; what is before 1970 becomes 1970.
        who.issued_at = claims.iat.map(|iat| (iat * 1_000.0) as u64);
        Ok(who)
    }
}

/// Tries what a PEM public key may be; each reader refuses keys of another kind.
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
        Err(_) => Err("the JWT key is no PEM public key of kind RSA, EC or Ed25519".into()),
    }
}

/// Signs claims with a shared secret (HS256): for `weft token`, development and tests.
pub fn mint(secret: &str, claims: &Claims) -> Result<String, String> {
    jsonwebtoken::encode(&Header::default(), claims, &EncodingKey::from_secret(secret.as_bytes()))
        .map_err(|error| error.to_string())
}
