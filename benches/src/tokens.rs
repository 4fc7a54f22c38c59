//! What it takes to verify a token, which is done once for each socket and each request.

use std::hint::black_box;
use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};

use crate::report::Figure;
use crate::target::progress;
use weft::auth::jwt::{Claims, Key, Verifier};
use weft::cli::common::Failure;
use weft::clock;

const SECRET: &str = "the benchmark's own secret, long enough";
/// A key pair of the benchmark's own, which nothing else trusts.
const PRIVATE: &[u8] = include_bytes!("tokens-private.pem");
const PUBLIC: &[u8] = include_bytes!("tokens-public.pem");

#[derive(Debug, Clone, clap::Args)]
pub struct TokensArgs {
    /// How long each measurement takes.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
}

pub fn run(args: &TokensArgs) -> Result<Vec<Figure>, Failure> {
    let each = Duration::from_secs(args.seconds.max(1));
    let hmac = (Algorithm::HS256, EncodingKey::from_secret(SECRET.as_bytes()), Key::Secret(SECRET.to_owned()));
    let rsa = (Algorithm::RS256, EncodingKey::from_rsa_pem(PRIVATE)?, Key::Pem(PUBLIC.to_vec()));
    let mut figures = Vec::new();
    for ((algorithm, signing, key), limit) in [(hmac, 50.0), (rsa, 200.0)] {
        progress(&format!("tokens {algorithm:?}"));
        let now = clock::now_s();
        let claims = Claims {
            sub: "ada".to_owned(),
            tenant: "bench".to_owned(),
            exp: now + 3_600,
            scope: Some("publish subscribe".to_owned()),
            iat: Some(now),
            ..Claims::default()
        };
        let token = jsonwebtoken::encode(&Header::new(algorithm), &claims, &signing)?;
        let verifier = Verifier::new(&key, None, None)?;
        let us = microseconds(&verifier, &token, each)?;
        figures.push(Figure::less(&format!("token {algorithm:?}"), us, "µs").at_most(limit));
    }
    Ok(figures)
}

/// The mean time of one verification.
fn microseconds(verifier: &Verifier, token: &str, each: Duration) -> Result<f64, Failure> {
    let (begin, mut verified) = (Instant::now(), 0u32);
    while begin.elapsed() < each {
        for _ in 0..100 {
            black_box(verifier.verify(black_box(token)).map_err(|error| error.to_string())?);
        }
        verified += 100;
    }
    Ok(begin.elapsed().as_secs_f64() * 1e6 / f64::from(verified))
}
