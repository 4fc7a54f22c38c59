//! Finds what answers a method and a path.
//!
//! Paths are templates such as `/v1/threads/{thread}/events`; a part in braces matches any one segment that is not empty.
//! One trailing slash of a request's path is passed over. Parameters are given as they stand in the path, not decoded.

use matchit::{InsertError, Router};
use warp::http::Method;

/// The parameters of a path, by name.
pub type Params = Vec<(String, String)>;

/// What is at a path.
#[derive(Debug, PartialEq)]
pub enum Found<'a, T> {
    One {
        value: &'a T,
        params: Params,
    },
    /// The path is there, with other methods.
    WrongMethod {
        template: &'a str,
        allowed: Vec<&'a Method>,
    },
    Nothing,
}

/// A path with what answers each of its methods.
struct Resource<T> {
    template: &'static str,
    methods: Vec<(Method, T)>,
}

pub struct Matcher<T> {
    router: Router<usize>,
    resources: Vec<Resource<T>>,
}

impl<T> Matcher<T> {
    /// Fails if two different templates match the same paths.
    pub fn new(routes: impl IntoIterator<Item = (Method, &'static str, T)>) -> Result<Matcher<T>, InsertError> {
        let mut matcher = Matcher { router: Router::new(), resources: Vec::new() };
        for (method, template, value) in routes {
            matcher.insert(method, template, value)?;
        }
        Ok(matcher)
    }

    fn insert(&mut self, method: Method, template: &'static str, value: T) -> Result<(), InsertError> {
        if let Some(known) = self.resources.iter_mut().find(|it| it.template == template) {
            known.methods.push((method, value));
            return Ok(());
        }
        self.router.insert(template, self.resources.len())?;
        self.resources.push(Resource { template, methods: vec![(method, value)] });
        Ok(())
    }

    pub fn find(&self, method: &Method, path: &str) -> Found<'_, T> {
        let path = path.strip_suffix('/').unwrap_or(path);
        let Ok(matched) = self.router.at(path) else { return Found::Nothing };
        let resource = &self.resources[*matched.value];

        match resource.methods.iter().find(|(known, _)| known == method) {
            Some((_, value)) => {
                let params = matched.params.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                Found::One { value, params }
            }
            None => Found::WrongMethod {
                template: resource.template,
                allowed: resource.methods.iter().map(|(method, _)| method).collect(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher() -> Matcher<u8> {
        let routes = [
            (Method::GET, "/v1/threads", 1),
            (Method::GET, "/v1/threads/{thread}", 2),
            (Method::PUT, "/v1/threads/{thread}", 3),
            (Method::GET, "/v1/threads/{thread}/runs/{run}", 4),
        ];
        Matcher::new(routes).expect("the templates differ")
    }

    fn one(path: &str) -> Option<(u8, Params)> {
        match matcher().find(&Method::GET, path) {
            Found::One { value, params } => Some((*value, params)),
            _ => None,
        }
    }

    #[test]
    fn a_path_is_found_with_its_parameters_as_they_stand() {
        assert_eq!(one("/v1/threads"), Some((1, vec![])));
        assert_eq!(one("/v1/threads/@me"), Some((2, vec![("thread".into(), "@me".into())])));
        assert_eq!(
            one("/v1/threads/a%2Fb/runs/r%201"),
            Some((4, vec![("thread".into(), "a%2Fb".into()), ("run".into(), "r%201".into())]))
        );
    }

    #[test]
    fn one_trailing_slash_is_passed_over_and_no_segment_may_be_empty() {
        assert_eq!(one("/v1/threads/").map(|it| it.0), Some(1));
        assert_eq!(one("/v1/threads/t/").map(|it| it.0), Some(2));
        for path in ["", "/", "/v1", "/v1/threads//", "/v1/threads/t//", "/v1//threads", "/v1/threads//runs/r"] {
            assert_eq!(one(path), None, "{path}");
        }
        assert_eq!(one("/v1/threads/t/runs"), None);
        assert_eq!(one("/V1/threads"), None);
    }

    #[test]
    fn a_method_that_a_path_does_not_have_is_answered_with_those_it_has() {
        let (get, put) = (Method::GET, Method::PUT);
        let wanted = Found::WrongMethod { template: "/v1/threads/{thread}", allowed: vec![&get, &put] };
        assert_eq!(matcher().find(&Method::DELETE, "/v1/threads/t"), wanted);
        assert_eq!(matcher().find(&Method::DELETE, "/v1/nothing"), Found::Nothing);
    }

    #[test]
    fn templates_that_match_the_same_paths_are_refused() {
        assert!(Matcher::new([(Method::GET, "/a/{b}", ()), (Method::PUT, "/a/{c}", ())]).is_err());
    }
}
