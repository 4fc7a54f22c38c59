//! The contract as machines read it: for each route what it takes and answers, from which the OpenAPI document is made.
//!
//! Which routes there are is said in [`super::routes`] alone; here is what their bodies are called in `schemas/`. A test
//! fails where a route has no entry, or an entry no route.

mod openapi;
mod operations;
mod released;

pub use operations::OPERATIONS;
pub use released::breaks;

use serde_json::Value;

use super::http::documents::Documents;
use crate::protocol::{asyncapi, json, schemas};

/// What one route takes and answers.
pub struct Operation {
    pub method: &'static str,
    pub path: &'static str,
    /// `operationId`: what a generated client calls it.
    pub id: &'static str,
    pub summary: &'static str,
    /// The parameters of its query and its headers; those of the path stand in the path.
    pub parameters: &'static [&'static str],
    pub body: Body,
    pub answers: &'static [Answer],
}

/// What a request has in its body, as its schema is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    None,
    Required(&'static str),
    /// None at all is the same as an empty object.
    Optional(&'static str),
}

/// One of the answers that are no refusals.
pub struct Answer {
    pub status: u16,
    pub content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// JSON of this schema.
    Json(&'static str),
    /// JSON of one of these.
    OneOf(&'static [&'static str]),
    /// JSON that is a document of its own kind.
    Document(&'static str),
    /// Server-Sent Events, the data of each of which is one of these.
    Events(&'static [&'static str]),
    Text,
    /// A file of one of these media types.
    File(&'static [&'static str]),
    Nothing,
}

impl Operation {
    /// The body's schema, if it has one.
    pub fn request(&self) -> Option<&'static str> {
        match self.body {
            Body::None => None,
            Body::Required(name) | Body::Optional(name) => Some(name),
        }
    }
}

/// The operation of a method and a path as a request has it.
pub fn find(method: &str, path: &str) -> Option<&'static Operation> {
    let parts: Vec<&str> = path.split('/').collect();
    let fits = |template: &str| {
        let template: Vec<&str> = template.split('/').collect();
        let same = |(a, b): (&&str, &&str)| a == b || a.starts_with('{');
        template.len() == parts.len() && template.iter().zip(&parts).all(same)
    };
    let found = OPERATIONS.iter().filter(|it| it.method == method && fits(it.path));
    // A path that is written out goes before one with a parameter there.
    found.min_by_key(|it| it.path.matches('{').count())
}

/// All documents, as they are served.
pub fn documents() -> Documents {
    let schemas = schemas::all().into_iter().map(|(name, schema)| (name.to_owned(), schemas::text(&schema).into()));
    Documents {
        openapi: text(&openapi::document()).into(),
        asyncapi: text(&asyncapi::document()).into(),
        schemas: schemas.collect(),
    }
}

/// The same as files: what each is called, and its text.
pub fn files() -> Vec<(String, String)> {
    let schemas = schemas::all().into_iter().map(|(name, schema)| (format!("{name}.json"), schemas::text(&schema)));
    let mut files: Vec<_> = schemas.collect();
    files.push(("openapi.json".to_owned(), text(&openapi::document())));
    files.push(("asyncapi.json".to_owned(), text(&asyncapi::document())));
    files
}

fn text(document: &Value) -> String {
    json::encode_pretty(document) + "\n"
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::routes::ROUTES;
    use super::*;

    #[test]
    fn each_route_has_one_entry_and_each_entry_a_route() {
        let routes: Vec<_> = ROUTES.iter().map(|it| (it.method.as_str(), it.path)).collect();
        let operations: Vec<_> = OPERATIONS.iter().map(|it| (it.method, it.path)).collect();
        let (all, entries): (BTreeSet<_>, BTreeSet<_>) = (routes.iter().collect(), operations.iter().collect());
        assert_eq!(
            all.difference(&entries).collect::<Vec<_>>(),
            Vec::<&&(&str, &str)>::new(),
            "routes without an entry"
        );
        assert_eq!(
            entries.difference(&all).collect::<Vec<_>>(),
            Vec::<&&(&str, &str)>::new(),
            "entries without a route"
        );
        assert_eq!((all.len(), entries.len()), (routes.len(), operations.len()), "each once");
    }

    #[test]
    fn operations_have_names_of_their_own_and_schemas_that_are_there() {
        let names: BTreeSet<_> = OPERATIONS.iter().map(|it| it.id).collect();
        assert_eq!(names.len(), OPERATIONS.len());
        let schemas: BTreeSet<_> = schemas::all().into_iter().map(|(name, _)| name).collect();
        let mut used = BTreeSet::from([openapi::WEBHOOK]);
        for it in OPERATIONS {
            used.extend(it.request());
            for answer in it.answers {
                match answer.content {
                    Content::Json(name) => drop(used.insert(name)),
                    Content::OneOf(names) | Content::Events(names) => used.extend(names),
                    Content::Document(_) | Content::File(_) | Content::Text | Content::Nothing => {}
                }
            }
        }
        assert_eq!(used.difference(&schemas).collect::<Vec<_>>(), Vec::<&&str>::new());
        // What goes over HTTP and is not the body of anything is a mistake, but for refusals.
        let http = schemas.iter().filter(|name| name.starts_with("http.")).copied();
        let unused: Vec<_> = http.filter(|name| !used.contains(name) && *name != "http.problem").collect();
        assert_eq!(unused, Vec::<&str>::new());
    }

    #[test]
    fn a_path_that_is_written_out_goes_before_a_parameter() {
        let id = |method, path| find(method, path).map(|it| it.id);
        assert_eq!(id("GET", "/v1/dead-letters/counts"), Some("countDeadLetters"));
        assert_eq!(id("GET", "/v1/dead-letters/x"), Some("getDeadLetter"));
        assert_eq!(id("POST", "/v1/threads/t/events"), Some("publish"));
        assert_eq!(id("POST", "/v1/threads/t/nothing"), None);
    }
}
