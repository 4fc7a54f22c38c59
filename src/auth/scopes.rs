//! What a token allows, and who may do what. Pure: the facts come in, the answer goes out.

use std::fmt;

use crate::log::Grant;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids::TENANT_THREAD;
use crate::protocol::kinds::KindClass;

/// What a token allows, beyond being who it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes {
    pub publish: bool,
    pub subscribe: bool,
    pub agent: bool,
    pub broadcast: bool,
    pub analyst: bool,
    pub admin: bool,
}

impl Scopes {
    /// From a space-separated list; absent means `publish subscribe`. Scopes of others are passed over.
    pub fn parse(scope: Option<&str>) -> Scopes {
        let mut scopes = Scopes::default();
        for name in scope.unwrap_or("publish subscribe").split_ascii_whitespace() {
            match name {
                "publish" => scopes.publish = true,
                "subscribe" => scopes.subscribe = true,
                "agent" => scopes.agent = true,
                "broadcast" => scopes.broadcast = true,
                "analyst" => scopes.analyst = true,
                "admin" => scopes.admin = true,
                _ => {}
            }
        }
        scopes
    }
}

/// As [`Scopes::parse`] reads it.
impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scopes { publish, subscribe, agent, broadcast, analyst, admin } = *self;
        let named = [
            (publish, "publish"),
            (subscribe, "subscribe"),
            (agent, "agent"),
            (broadcast, "broadcast"),
            (analyst, "analyst"),
            (admin, "admin"),
        ];
        let names: Vec<&str> = named.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect();
        f.write_str(&names.join(" "))
    }
}

/// What is known of a standing in a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Member,
    /// The thread exists, and the user is no member.
    Stranger,
    NoThread,
}

fn missing(scope: &'static str) -> Error {
    Error::new(Code::Forbidden, format!("the token lacks scope {scope}"))
}

/// What a class of events asks of the token, wherever it is written: who speaks in another role than a user's, and what
/// only agents do.
fn check_role(scopes: Scopes, class: KindClass) -> Result<(), Error> {
    let needs_agent = match class {
        KindClass::SystemMessage | KindClass::AgentMessage | KindClass::Token => true,
        KindClass::Agent { member_may, .. } => !member_may,
        KindClass::UserMessage | KindClass::Custom => false,
    };
    if needs_agent && !(scopes.agent || scopes.admin) {
        return Err(missing("agent").at("kind"));
    }
    Ok(())
}

/// By which right an event of this class may be appended. `standing` is asked for only where it matters.
pub fn publish(
    scopes: Scopes,
    class: KindClass,
    standing: impl FnOnce() -> Result<Standing, Error>,
) -> Result<Grant, Error> {
    // What an agent writes in the threads where it works, member or not.
    let agents_own =
        scopes.agent && matches!(class, KindClass::Agent { .. } | KindClass::AgentMessage | KindClass::Token);
    if !(scopes.publish || scopes.admin || agents_own) {
        return Err(missing("publish"));
    }
    check_role(scopes, class)?;
    if scopes.admin || agents_own {
        return Ok(Grant::Scope);
    }

    match standing()? {
        Standing::Stranger => Err(Error::no_thread()),
        // The record must show that its writer had the right to this role: readers of the log have nothing else to go by.
        Standing::Member | Standing::NoThread if class == KindClass::SystemMessage => Ok(Grant::Scope),
        Standing::Member | Standing::NoThread => Ok(Grant::Member),
    }
}

/// By which right an event may be appended to a thread that exists by its name: everybody's, for which there is a scope; or
/// an inbox, to which agents and those who `may_write` do.
pub fn publish_reserved(
    scopes: Scopes,
    class: KindClass,
    thread: &str,
    may_write: impl FnOnce() -> Result<bool, Error>,
) -> Result<Grant, Error> {
    let everybody = thread == TENANT_THREAD;
    let by_scope = scopes.admin || if everybody { scopes.broadcast } else { scopes.agent };
    if !by_scope && everybody {
        return Err(missing("broadcast").at("thread"));
    }
    if !(by_scope || scopes.publish) {
        return Err(missing("publish"));
    }
    check_role(scopes, class)?;

    match by_scope {
        true if scopes.agent || scopes.admin => Ok(Grant::Scope),
        // Not as an agent: with no more rights to what agents write than a member of a thread has.
        _ if by_scope || may_write()? => Ok(Grant::Member),
        _ => Err(Error::no_thread()),
    }
}

/// Refuses whoever does not read every thread of the tenant.
pub fn read_all(scopes: Scopes) -> Result<(), Error> {
    if reads_by_scope(scopes) { Ok(()) } else { Err(missing("analyst")) }
}

/// Whether the user reads by scope, member or not; or by membership, if at all.
pub fn reads_by_scope(scopes: Scopes) -> bool {
    scopes.analyst || scopes.admin
}

/// Whether the token allows reading: what, depends on the threads. An agent reads where it works.
pub fn read(scopes: Scopes) -> Result<(), Error> {
    if scopes.subscribe || scopes.agent || reads_by_scope(scopes) { Ok(()) } else { Err(missing("subscribe")) }
}

/// Whether the token allows to make and manage threads at all, and to signal in them; looked at before any thread is.
pub fn may_publish(scopes: Scopes) -> Result<(), Error> {
    if scopes.publish || scopes.admin { Ok(()) } else { Err(missing("publish")) }
}

/// Whether the token allows to look after the tenant: sessions, dead letters, groups.
pub fn administer(scopes: Scopes) -> Result<(), Error> {
    if scopes.admin { Ok(()) } else { Err(missing("admin")) }
}

/// Whether the token allows to take work of groups, and to look at them.
pub fn work(scopes: Scopes) -> Result<(), Error> {
    if scopes.agent || scopes.admin { Ok(()) } else { Err(missing("agent")) }
}

/// By which right a thread's members and title may be changed.
pub fn manage(scopes: Scopes, standing: Standing) -> Result<Grant, Error> {
    may_publish(scopes)?;
    match standing {
        Standing::Member => Ok(Grant::Member),
        Standing::Stranger if scopes.admin => Ok(Grant::Scope),
        Standing::Stranger | Standing::NoThread => Err(Error::no_thread()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT_EVENT: KindClass = KindClass::Agent { member_may: false, required: &[] };
    const RESUMED: KindClass = KindClass::Agent { member_may: true, required: &[] };

    fn judged(scope: &str, class: KindClass, standing: Standing) -> Result<Grant, Code> {
        publish(Scopes::parse(Some(scope)), class, || Ok(standing)).map_err(|error| error.code)
    }

    #[test]
    fn scopes_are_written_as_they_are_read() {
        for scope in ["", "publish", "publish subscribe", "publish subscribe agent broadcast analyst admin", "agent"] {
            assert_eq!(Scopes::parse(Some(scope)).to_string(), scope);
        }
    }

    #[test]
    fn members_publish_and_strangers_find_nothing() {
        assert_eq!(judged("publish", KindClass::UserMessage, Standing::Member), Ok(Grant::Member));
        assert_eq!(judged("publish", KindClass::UserMessage, Standing::NoThread), Ok(Grant::Member));
        assert_eq!(judged("publish", KindClass::UserMessage, Standing::Stranger), Err(Code::NotFound));
        // The same answer as for a thread that is not there.
        assert_eq!(judged("publish", AGENT_EVENT, Standing::Stranger), Err(Code::Forbidden));
        assert_eq!(judged("publish", AGENT_EVENT, Standing::NoThread), Err(Code::Forbidden));
        assert_eq!(judged("publish", RESUMED, Standing::Member), Ok(Grant::Member));
        assert_eq!(judged("publish", RESUMED, Standing::Stranger), Err(Code::NotFound));
    }

    #[test]
    fn agent_events_need_the_scope_and_then_no_membership() {
        assert_eq!(judged("publish", AGENT_EVENT, Standing::Member), Err(Code::Forbidden));
        assert_eq!(judged("agent", AGENT_EVENT, Standing::Stranger), Ok(Grant::Scope));
        assert_eq!(judged("agent", KindClass::AgentMessage, Standing::Stranger), Ok(Grant::Scope));
        assert_eq!(judged("agent", KindClass::UserMessage, Standing::Member), Err(Code::Forbidden));
        assert_eq!(judged("agent publish", KindClass::UserMessage, Standing::Stranger), Err(Code::NotFound));
        assert_eq!(judged("agent publish", KindClass::Custom, Standing::Stranger), Err(Code::NotFound));
    }

    #[test]
    fn only_agents_and_admins_speak_as_the_assistant_or_the_system_and_the_record_shows_it() {
        for class in [KindClass::SystemMessage, KindClass::AgentMessage] {
            assert_eq!(judged("publish", class, Standing::Member), Err(Code::Forbidden));
            assert_eq!(judged("publish agent", class, Standing::Member), Ok(Grant::Scope));
            assert_eq!(judged("admin", class, Standing::Stranger), Ok(Grant::Scope));
        }
        assert_eq!(judged("publish agent", KindClass::SystemMessage, Standing::Stranger), Err(Code::NotFound));
        assert_eq!(judged("publish agent", KindClass::UserMessage, Standing::Member), Ok(Grant::Member));
    }

    #[test]
    fn everybody_hears_who_may_broadcast_and_an_inbox_takes_what_agents_and_acquaintances_write() {
        let judged = |scope: &str, thread: &str, met: bool| {
            publish_reserved(Scopes::parse(Some(scope)), KindClass::UserMessage, thread, || Ok(met))
                .map_err(|it| it.code)
        };
        assert_eq!(judged("broadcast", "@tenant", false), Ok(Grant::Member));
        assert_eq!(judged("broadcast agent", "@tenant", false), Ok(Grant::Scope));
        assert_eq!(judged("publish", "@tenant", true), Err(Code::Forbidden));
        assert_eq!(judged("agent", "@tenant", true), Err(Code::Forbidden));
        assert_eq!(judged("publish", "@user:ada", true), Ok(Grant::Member));
        assert_eq!(judged("publish", "@user:ada", false), Err(Code::NotFound));
        assert_eq!(judged("agent", "@user:ada", false), Ok(Grant::Scope));
        assert_eq!(judged("subscribe", "@user:ada", true), Err(Code::Forbidden));
    }

    #[test]
    fn a_token_without_the_scope_is_refused_before_anything_is_looked_up() {
        let refused = publish(Scopes::parse(Some("subscribe")), KindClass::UserMessage, || panic!("not looked up"));
        assert_eq!(refused.map_err(|error| error.code), Err(Code::Forbidden));
        assert!(read(Scopes::parse(Some("publish"))).is_err());
        assert!(read(Scopes::parse(None)).is_ok());
        assert!(work(Scopes::parse(None)).is_err() && work(Scopes::parse(Some("agent"))).is_ok());
    }
}
