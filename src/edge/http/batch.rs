//! `POST /v1/events`: many publishes in one request, which go to the log together. Each has its own outcome.

use std::sync::Arc;

use tokio::task::yield_now;
use warp::http::StatusCode;

use super::reply::{Reply, charged, json};
use super::request::Request;
use super::{Api, BODY_COPIES, Body};
use crate::auth::Principal;
use crate::ingest::admit::{Admitted, PublishRequest};
use crate::projector::Published;
use crate::protocol::batch::{BatchBody, BatchItem, BatchPublish, BatchRefusal, BatchReply, MAX_BATCH_BYTES};
use crate::protocol::error::Error;
use crate::protocol::http::PublishReply;
use crate::protocol::ids::ThreadAddress;
use crate::protocol::json::decode;
use crate::protocol::kinds::DeltaData;

/// How many publishes are judged before others have their turn on the worker.
const AT_ONCE: usize = 32;
/// What one counts for whose kind may have a schema: to check its data takes longer than all else.
const CUSTOM: usize = 8;
/// About what one publish costs beside its text: what is known of it, and its answer.
const ITEM_BYTES: usize = 1 << 10;

/// One publish of the request, read and with its thread resolved.
struct Addressed<'a> {
    publish: BatchPublish<'a>,
    address: ThreadAddress,
}

impl<'a> Addressed<'a> {
    fn read(who: &Principal, text: &'a str) -> Result<Addressed<'a>, Error> {
        let publish = BatchPublish::read(text)?;
        let address = ThreadAddress::resolve(&who.user, publish.thread.to_string());
        Ok(Addressed { publish, address })
    }

    fn weight(&self) -> usize {
        if self.publish.kind.starts_with("x.") { CUSTOM } else { 1 }
    }

    fn request<'b>(&'b self, traceparent: Option<&'b str>) -> PublishRequest<'b> {
        PublishRequest {
            thread: &self.address.name,
            kind: &self.publish.kind,
            data: self.publish.data,
            key: self.publish.key.as_deref(),
            run: self.publish.run.as_deref(),
            parent: self.publish.parent,
            priority: self.publish.priority,
            traceparent,
        }
    }
}

/// `POST /v1/events`
pub async fn publish(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    if it.header("Idempotency-Key")?.is_some() {
        let why = "Idempotency-Key is for one event; here each has its own, in its field key";
        return Err(Error::field("Idempotency-Key", why));
    }
    let Body { text, mut charge } = api.body_up_to(&mut it, MAX_BATCH_BYTES).await?;
    let events = decode::<BatchBody>(&text)?.checked()?;
    charge.add(text.len() * BODY_COPIES + events.len() * ITEM_BYTES)?;
    api.admission.count_more(&it.who, events.len() - 1)?;

    let read: Vec<_> = events.iter().map(|event| Addressed::read(&it.who, event.get())).collect();
    let judged = judge_all(&api, &it.who, &read, it.traceparent()?).await?;
    let admitted = count_bytes(&api, &it.who, judged);
    let drafts = admitted.iter().flatten().map(|admitted| &admitted.draft);
    let mut verdicts = api.submit.publish_all(drafts).await.into_iter();

    let mut verdict = || verdicts.next().expect("there is one for each that was admitted");
    let outcomes: Vec<_> = admitted
        .iter()
        .map(|admitted| match admitted {
            Ok(admitted) => verdict().map(|published| (admitted.delta.as_ref(), published)),
            Err(error) => Err(error.clone()),
        })
        .collect();
    let items = read.iter().zip(&outcomes).map(|(read, outcome)| item(read, outcome)).collect();
    Ok(charged(json(StatusCode::OK, &BatchReply { items }), charge))
}

/// What each publish becomes, or why it is refused. Nothing is in the log yet: an error that is not one publish's is that of
/// the whole request.
async fn judge_all<'a>(
    api: &Api,
    who: &'a Principal,
    read: &'a [Result<Addressed<'a>, Error>],
    traceparent: Option<&'a str>,
) -> Result<Vec<Result<Admitted<'a>, Error>>, Error> {
    let (mut judged, mut since) = (Vec::with_capacity(read.len()), 0);
    for it in read {
        since += it.as_ref().map_or(1, Addressed::weight);
        if since >= AT_ONCE {
            yield_now().await;
            since = 0;
        }
        judged.push(match it {
            Ok(it) => judge(api, who, it.request(traceparent)).await,
            Err(error) => Err(error.clone()),
        });
    }

    // Asked once for all of them, however many were not found.
    let may_be_missing = |judged: &Result<_, Error>| {
        let error = judged.as_ref().err();
        error.is_some_and(|error| api.level.may_be_missing(error))
    };
    if judged.iter().any(may_be_missing) {
        api.level.reach().await?;
        for (judged, it) in judged.iter_mut().zip(read) {
            if let Ok(it) = it
                && may_be_missing(judged)
            {
                since += it.weight();
                if since >= AT_ONCE {
                    yield_now().await;
                    since = 0;
                }
                *judged = judge(api, who, it.request(traceparent)).await;
            }
        }
    }
    Ok(judged)
}

async fn judge<'a>(api: &Api, who: &'a Principal, request: PublishRequest<'a>) -> Result<Admitted<'a>, Error> {
    if api.rights.must_look_up(who, request.thread)? {
        api.rights.look_up(who, request.thread).await;
    }
    api.admission.judge(who, request)
}

/// Counts the bytes of each against the tenant's rate. Once one is over it, so are all that follow: none overtakes another.
fn count_bytes<'a>(
    api: &Api,
    who: &Principal,
    judged: Vec<Result<Admitted<'a>, Error>>,
) -> Vec<Result<Admitted<'a>, Error>> {
    let mut over = None;
    let mut count = |admitted: &Admitted<'_>| match &over {
        Some(error) => Err(Error::clone(error)),
        None => {
            let counted = api.admission.count_bytes(who, admitted.draft.event.data.get().len());
            counted.inspect_err(|error| over = Some(error.clone()))
        }
    };
    judged.into_iter().map(|judged| judged.and_then(|admitted| count(&admitted).map(|()| admitted))).collect()
}

fn item<'a>(
    read: &'a Result<Addressed<'_>, Error>,
    outcome: &'a Result<(Option<&DeltaData<'a>>, Published), Error>,
) -> BatchItem<'a> {
    match (read, outcome) {
        (Ok(read), Ok((delta, published))) => BatchItem::Published(PublishReply {
            thread: &read.address.called,
            seq: delta.is_none().then_some(published.seq),
            event: published.event,
            duplicate: published.duplicate,
            message: delta.map(|delta| &*delta.message),
            to_char: delta.map(DeltaData::to_char),
        }),
        (_, Err(error)) | (Err(error), _) => BatchItem::Refused(BatchRefusal::of(error)),
    }
}
