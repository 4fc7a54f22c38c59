//! The contract as machines read it. It is the same for everybody, and no secret: it asks for no token.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use warp::http::{HeaderValue, Response, header};

use super::reply::Reply;
use super::request::AnonymousRequest;
use crate::edge::blocking;
use crate::protocol::error::{Code, Error};

/// The documents as they are served.
pub struct Documents {
    pub openapi: Bytes,
    pub asyncapi: Bytes,
    /// By their names.
    pub schemas: BTreeMap<String, Bytes>,
}

/// Made when somebody first asks for one, since most servers are never asked.
pub struct LazyDocuments {
    made: OnceLock<Documents>,
    make: fn() -> Documents,
}

impl LazyDocuments {
    pub fn new(make: fn() -> Documents) -> LazyDocuments {
        LazyDocuments { made: OnceLock::new(), make }
    }
}

/// `GET /v1/openapi.json`
pub async fn openapi(documents: Arc<LazyDocuments>, it: AnonymousRequest) -> Result<Reply, Error> {
    it.no_query()?;
    serve(documents, "application/json", |all| Ok(all.openapi.clone())).await
}

/// `GET /v1/asyncapi.json`
pub async fn asyncapi(documents: Arc<LazyDocuments>, it: AnonymousRequest) -> Result<Reply, Error> {
    it.no_query()?;
    serve(documents, "application/json", |all| Ok(all.asyncapi.clone())).await
}

/// `GET /v1/schemas/{name}`, by its name or as its file is called.
pub async fn schema(documents: Arc<LazyDocuments>, it: AnonymousRequest) -> Result<Reply, Error> {
    it.no_query()?;
    let asked = it.segment("name")?;
    let missing = || Error::new(Code::NotFound, format!("there is no schema {asked:.60}")).at("name");
    let name = asked.strip_suffix(".json").unwrap_or(&asked).to_owned();
    serve(documents, "application/schema+json", |all| all.schemas.get(&name).cloned().ok_or_else(missing)).await
}

async fn serve(
    documents: Arc<LazyDocuments>,
    content_type: &'static str,
    one: impl FnOnce(&Documents) -> Result<Bytes, Error>,
) -> Result<Reply, Error> {
    if documents.made.get().is_none() {
        // That takes some milliseconds.
        let documents = documents.clone();
        let make = move || {
            documents.made.get_or_init(documents.make);
            Ok(())
        };
        blocking(make).await?;
    }
    let mut reply = Response::new(one(documents.made.get_or_init(documents.make))?);
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(reply)
}
