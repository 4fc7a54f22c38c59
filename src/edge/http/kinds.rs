//! Custom kinds and their schemas.

use std::sync::Arc;

use serde_json::value::RawValue;
use warp::http::StatusCode;

use super::Api;
use super::meter::Meter;
use super::page::{COPIES, Page};
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::clock;
use crate::edge::blocking;
use crate::ingest::kinds::Schema;
use crate::log::Record;
use crate::protocol::custom::{KindDeleted, KindDetail, KindItem, KindList, KindRecord, MAX_SCHEMA, check_kind};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{KIND_DELETED, KIND_SET};
use crate::store::KindRow;

/// About the size of a kind in a list, beside its name.
const ITEM_BYTES: usize = 512;
/// How many bytes the body of a schema may have: with white space before and after it.
const BODY_BYTES: usize = MAX_SCHEMA + (1 << 10);

fn name_of(it: &Request) -> Result<String, Error> {
    let kind = it.segment("kind")?;
    check_kind(&kind)?;
    Ok(kind)
}

fn item(kind: &str, row: KindRow) -> KindItem {
    KindItem { kind: kind.to_owned(), bytes: row.bytes, set_by: row.by, set_at: clock::rfc3339(row.at) }
}

fn no_schema() -> Error {
    Error::new(Code::NotFound, "this kind has no schema: it takes any data").at("kind")
}

/// `GET /v1/kinds`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let page: Page<Vec<u8>> = Page::read(&it.query(&["cursor", "limit"])?, &it.who, &api.epoch, "kinds", &[])?;
    let mut meter = api.meter(&it.who, (page.limit + 1) * ITEM_BYTES * COPIES).await?;
    blocking(move || {
        let found = api.store.kinds(&it.who.tenant).map(|row| row.map(|(kind, row)| (kind.into_bytes(), row)));
        let selected = page.select(found)?;
        let make = |kind: &Vec<u8>, row: KindRow, _: &mut Meter| {
            Ok(Some((item(&String::from_utf8_lossy(kind), row), ITEM_BYTES + kind.len())))
        };
        let (kinds, next) = page.fill(selected.into_iter().map(Ok), &mut meter, make)?;
        Ok(charged(json(StatusCode::OK, &KindList { kinds, next }), meter))
    })
    .await
}

/// `GET /v1/kinds/{kind}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let kind = name_of(&it)?;
    let meter = api.meter(&it.who, MAX_SCHEMA * COPIES).await?;
    let (row, stored) = loop {
        let found = (api.store.kind(&it.who.tenant, &kind)?, api.store.kind_schema(&it.who.tenant, &kind)?);
        match found {
            (Some(row), Some(stored)) if row.id == stored.id => break (row, stored),
            (None, _) => return Err(no_schema()),
            // It was replaced or deleted between both.
            _ => {}
        }
    };
    // A record's JSON.
    let schema =
        RawValue::from_string(stored.schema).map_err(|_| Error::new(Code::Internal, "the schema is no JSON"))?;
    Ok(charged(json(StatusCode::OK, &KindDetail { kind: item(&kind, row), schema }), meter))
}

/// `PUT /v1/kinds/{kind}`: sets its schema, or another one.
pub async fn put(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let kind = name_of(&it)?;
    let body = api.body_up_to(&mut it, BODY_BYTES).await?;
    let schema: Box<RawValue> = decode(body.text.trim())?;
    let schema = blocking(move || Schema::compile(schema.get()).map(|_| schema)).await?;
    drop(body);

    let is_new = api.store.kind(&it.who.tenant, &kind)?.is_none();
    write(&api, &it, &kind, Some(&schema)).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let row = api.store.kind(&it.who.tenant, &kind)?.ok_or_else(no_schema)?;
    Ok(json(status, &item(&kind, row)))
}

/// `DELETE /v1/kinds/{kind}`: from then on it takes any data.
pub async fn delete(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let kind = name_of(&it)?;
    write(&api, &it, &kind, None).await?;
    Ok(json(StatusCode::OK, &KindDeleted { kind: &kind, deleted: true }))
}

/// Writes what becomes of a kind's schema, and waits until this node goes by it.
async fn write(api: &Api, it: &Request, kind: &str, schema: Option<&RawValue>) -> Result<(), Error> {
    let id = clock::event_id();
    let record = Record::from(&KindRecord {
        kind: if schema.is_some() { KIND_SET } else { KIND_DELETED }.into(),
        id,
        tenant: (&*it.who.tenant).into(),
        name: kind.into(),
        schema,
        by: (&*it.who.user).into(),
        at: clock::rfc3339(clock::now_ms()).into(),
    });
    api.admission.count_bytes(&it.who, record.value.len())?;
    api.submit.write(id, record).await.map(drop)
}

/// The schema of a body, as it was sent.
fn decode(text: &str) -> Result<Box<RawValue>, Error> {
    serde_json::from_str(text).map_err(|error| {
        let why = format!("the JSON is not valid: line {}, column {}", error.line(), error.column());
        Error::new(Code::BadRequest, why)
    })
}
