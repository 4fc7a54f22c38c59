//! Custom kinds with a schema: what is said about one over HTTP and in the log.
//!
//! Records about the kinds of a tenant are in one partition, whose key is [`log_key`], so that those who set one at the same
//! time have an order, and a tenant's kinds can be counted.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::error::Error;
use super::ids;
use super::kinds::{self, KindClass};

/// How many kinds of a tenant may have a schema.
pub const MAX_KINDS: usize = 256;
/// How long a schema may be, in bytes.
pub const MAX_SCHEMA: usize = 64 << 10;

/// What the keys of records about kinds begin with. They have no `/`, so no event has such a key.
const KEY: &str = "kinds:";

/// The key of all records about a tenant's kinds.
pub fn log_key(tenant: &str) -> String {
    format!("{KEY}{tenant}")
}

/// Whose kinds a record with this key is about, if it is about kinds.
pub fn tenant_of_key(key: &str) -> Option<&str> {
    key.strip_prefix(KEY).filter(|tenant| ids::check_name("tenant", tenant).is_ok())
}

/// Only a kind of one's own may have a schema.
pub fn check_kind(kind: &str) -> Result<(), Error> {
    match kinds::classify(kind) {
        Ok(KindClass::Custom) => Ok(()),
        _ => Err(Error::field("kind", "a kind that may have a schema is x.<name>, of at most 128 bytes in all")),
    }
}

/// A kind as a list has it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct KindItem {
    pub kind: String,
    /// How long its schema is.
    pub bytes: u64,
    /// The user who set it.
    pub set_by: String,
    /// RFC 3339.
    pub set_at: String,
}

/// A kind with its schema.
#[derive(Serialize, JsonSchema)]
pub struct KindDetail {
    #[serde(flatten)]
    pub kind: KindItem,
    /// A JSON Schema, as it was sent.
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub schema: Box<RawValue>,
}

/// A page of kinds, by their names.
#[derive(Serialize, JsonSchema)]
pub struct KindList {
    pub kinds: Vec<KindItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The answer to `DELETE /v1/kinds/{kind}`.
#[derive(Serialize, JsonSchema)]
pub struct KindDeleted<'a> {
    pub kind: &'a str,
    /// Always `true`.
    pub deleted: bool,
}

/// The body of `PUT /v1/kinds/{kind}`: a JSON Schema, draft 2020-12.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct KindSchema(pub serde_json::Map<String, serde_json::Value>);

/// Somebody sets the schema of a kind, or deletes it. Its key is [`log_key`]; it gets no seq.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KindRecord<'a> {
    /// `kind_set` or `kind_deleted`.
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    /// UUIDv7 of this record.
    pub id: Uuid,
    #[serde(borrow)]
    pub tenant: Cow<'a, str>,
    /// The kind that it is about.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// Of `kind_set`: the schema, at most 64 KiB.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub schema: Option<&'a RawValue>,
    /// The user who did it.
    #[serde(borrow)]
    pub by: Cow<'a, str>,
    /// RFC 3339.
    #[serde(borrow)]
    pub at: Cow<'a, str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kind_of_one_s_own_may_have_a_schema() {
        let longest = format!("x.{}", "n".repeat(126));
        for kind in ["x.order", "x.order/line", "x.é", &longest] {
            assert_eq!(check_kind(kind), Ok(()), "{kind}");
        }
        for none in ["", "x.", "order", "user_message", "kind_set", "agent_token", &format!("{longest}n")] {
            assert_eq!(check_kind(none).expect_err(none).field.as_deref(), Some("kind"), "{none}");
        }
    }

    #[test]
    fn the_kinds_of_a_tenant_have_a_key_that_no_thread_has() {
        assert_eq!(tenant_of_key(&log_key("acme")), Some("acme"));
        for none in ["weft", "kinds:", "kinds:acme/t", "acme/kinds:acme", "groups:acme"] {
            assert_eq!(tenant_of_key(none), None, "{none}");
        }
    }
}
