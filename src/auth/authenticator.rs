//! From credentials to a user whose tokens have not been revoked.

use std::borrow::Cow;
use std::sync::Arc;

use jsonwebtoken::Algorithm;
use serde::Deserialize;
use serde_json::Value;

use super::Principal;
use super::issuers::Issuer;
use super::jwks::KeySet;
use super::jwt::{Expected, Verifier, verify_with};
use super::sessions::Sessions;
use crate::clock;
use crate::outbound::Service;
use crate::protocol::error::{Code, Error};
use crate::store::Store;

/// What somebody shows to be let in.
#[derive(Clone)]
pub enum Credential<'a> {
    /// A JWT.
    Token(Cow<'a, str>),
    /// A session of the auth service.
    Session(Cow<'a, str>),
}

impl<'a> Credential<'a> {
    pub fn token(text: &'a str) -> Credential<'a> {
        Credential::Token(text.into())
    }

    pub fn session(text: &'a str) -> Credential<'a> {
        Credential::Session(text.into())
    }

    pub fn into_owned(self) -> Credential<'static> {
        match self {
            Credential::Token(text) => Credential::Token(text.into_owned().into()),
            Credential::Session(text) => Credential::Session(text.into_owned().into()),
        }
    }
}

/// The keys of tokens.
#[derive(Default)]
pub struct Keys {
    /// The one that is configured.
    pub own: Option<Verifier>,
    /// Those that are fetched. One without a name is the only one.
    pub issuers: Vec<Arc<Issuer>>,
    /// Tokens of these issuers must have this `aud`.
    pub audience: Option<String>,
}

/// Which key a token says it is signed with. Nothing of it is verified.
struct Claimed {
    algorithm: Algorithm,
    kid: Option<String>,
    issuer: Option<String>,
}

/// Who verifies a token.
enum By<'a> {
    Own(&'a Verifier),
    Issuer(&'a Issuer, Claimed),
}

impl Keys {
    fn find(&self, token: &str) -> Result<By<'_>, Error> {
        let refuse = |why| Err(Error::new(Code::Unauthenticated, why).at("token"));
        match (&self.own, &self.issuers[..]) {
            (Some(own), []) => return Ok(By::Own(own)),
            (None, []) => return refuse("this server takes no tokens, only sessions".to_owned()),
            _ => {}
        }
        let claimed = match (claimed(token), &self.own) {
            (Some(claimed), Some(own)) if own.is_for(claimed.algorithm) => return Ok(By::Own(own)),
            (Some(claimed), _) => claimed,
            // It says better what is wrong.
            (None, Some(own)) => return Ok(By::Own(own)),
            (None, None) => {
                return refuse("the token is not a JWT with a known algorithm and claims in JSON".to_owned());
            }
        };
        let is_of = |issuer: &&Arc<Issuer>| issuer.name().is_none() || issuer.name() == claimed.issuer.as_deref();
        match self.issuers.iter().find(is_of) {
            Some(issuer) => Ok(By::Issuer(issuer, claimed)),
            None => match &claimed.issuer {
                Some(other) => {
                    refuse(format!("the token's claim `iss` is `{other:.100}`, which is none of this server's"))
                }
                None => refuse("the token's claim `iss` is missing".to_owned()),
            },
        }
    }

    /// Verifies a token with a key of the set, as its issuer's.
    fn verify(&self, token: &str, keys: &KeySet, issuer: &Issuer, claimed: &Claimed) -> Result<Principal, Error> {
        let verified = match keys.find(claimed.kid.as_deref(), claimed.algorithm) {
            Some(key) => {
                let expected = Expected { issuer: issuer.name(), audience: self.audience.as_deref() };
                verify_with(key, expected, token, clock::now_s())
            }
            None if claimed.kid.is_none() => {
                Err("the token does not say which key it is signed with (`kid`)".to_owned())
            }
            None => Err(format!("the token's algorithm, {:?}, is none of its key's", claimed.algorithm)),
        };
        verified.map_err(|why| Error::new(Code::Unauthenticated, why).at("token"))
    }
}

fn claimed(token: &str) -> Option<Claimed> {
    #[derive(Deserialize)]
    struct Issued {
        iss: Option<Value>,
    }
    let read = jsonwebtoken::dangerous::insecure_decode::<Issued>(token).ok()?;
    let issuer = read.claims.iss.and_then(|iss| iss.as_str().map(str::to_owned));
    Some(Claimed { algorithm: read.header.alg, kid: read.header.kid, issuer })
}

pub struct Authenticator {
    keys: Keys,
    sessions: Option<Arc<Sessions>>,
    store: Arc<Store>,
}

impl Authenticator {
    pub fn new(keys: Keys, sessions: Option<Arc<Sessions>>, store: Arc<Store>) -> Authenticator {
        Authenticator { keys, sessions, store }
    }

    /// Whether sessions of an auth service let anybody in.
    pub fn takes_sessions(&self) -> bool {
        self.sessions.is_some()
    }

    /// The services that it asks.
    pub fn services(&self) -> Vec<Arc<Service>> {
        let issuers = self.keys.issuers.iter().flat_map(|issuer| issuer.services());
        issuers.chain(self.sessions.iter().map(|sessions| sessions.service().clone())).collect()
    }

    /// The user, if no other service need be asked.
    pub fn verify_now(&self, credential: &Credential<'_>) -> Option<Result<Principal, Error>> {
        let verified = match credential {
            Credential::Session(session) => match self.sessions() {
                Ok(sessions) => sessions.verify_now(session)?,
                Err(error) => Err(error),
            },
            Credential::Token(token) => match self.keys.find(token) {
                Ok(By::Own(own)) => own.verify(token),
                Ok(By::Issuer(issuer, claimed)) => issuer
                    .keys_now(claimed.kid.as_deref())?
                    .and_then(|keys| self.keys.verify(token, &keys, issuer, &claimed)),
                Err(error) => Err(error),
            },
        };
        Some(verified.and_then(|who| self.check_revoked(&who).map(|()| who)))
    }

    /// The user; asks another service if need be, and waits for it for 2 s at most.
    pub async fn verify(&self, credential: &Credential<'_>) -> Result<Principal, Error> {
        let who = match credential {
            // Boxed: a request that asks nobody has no room for it.
            Credential::Session(session) => Box::pin(self.sessions()?.verify(session)).await?,
            Credential::Token(token) => match self.keys.find(token)? {
                By::Own(own) => own.verify(token)?,
                By::Issuer(issuer, claimed) => {
                    let keys = Box::pin(issuer.keys(claimed.kid.as_deref())).await?;
                    self.keys.verify(token, &keys, issuer, &claimed)?
                }
            },
        };
        self.check_revoked(&who)?;
        Ok(who)
    }

    fn sessions(&self) -> Result<&Sessions, Error> {
        let none = || Error::new(Code::Unauthenticated, "this server takes no sessions, only tokens").at("session");
        self.sessions.as_deref().ok_or_else(none)
    }

    /// Refuses a user whose session is over, and one whose token was issued before the user's tokens were revoked. A token that
    /// does not say when it was issued may be that old.
    pub fn check_revoked(&self, who: &Principal) -> Result<(), Error> {
        if who.session.as_ref().is_some_and(|session| session.is_over()) {
            return Err(Error::new(Code::Unauthenticated, "the session is over"));
        }
        let Some(revoked) = self.store.revocation(&who.tenant, &who.user)? else { return Ok(()) };

        match who.issued_at {
            Some(at) if at > revoked.until => Ok(()),
            _ => Err(Error::new(Code::Unauthenticated, "the user's tokens were revoked after this one was issued")),
        }
    }
}
