//! What each version of the rules brought. A rule that can change a verdict or a row goes by the version of the record that
//! is judged (`record.rules`), and by nothing else: `if rules >= rules::THE_NEW_ONE { … } else { … }`. What stands in the
//! `else` stays there for as long as there are logs with records of that version.
//!
//! Version 1: the rules of before they had versions.

/// Version 2: `agent_token` with `restart` begins its message anew. Before, `data` with that field was refused.
pub(super) const MESSAGES_RESTART: u16 = 2;

/// Version 2: an answer (`agent_resumed`) names its question, and an ending by the server names the event that it follows.
pub(super) const ANSWERS_NAME_QUESTIONS: u16 = 2;

/// Version 2 as well: tickets are in the log. Before that a record with such a key was foreign.
pub(super) const TICKETS_IN_THE_LOG: u16 = 2;

/// Version 3: letters are requeued and discarded by records, and a dead letter of a delivery says more about itself.
pub(super) const LETTERS_ARE_ACTED_ON: u16 = 3;

/// Version 4: groups and their work are in the log. Before that a record of such a kind, or with such a key, was foreign.
pub(super) const WORK_IN_THE_LOG: u16 = 4;

/// Version 4: a delivery that was given up can be requeued. Before that to requeue one was refused.
pub(super) const DELIVERIES_ARE_REQUEUED: u16 = 4;

/// Version 5: a thread of a group is paused, and an event makes room in a full group. Before that a record of such a kind was
/// foreign.
pub(super) const WORK_OVERFLOWS: u16 = 5;

/// Version 5: a lease may stand beside others of its thread. Before that a lease that said so was foreign.
pub(super) const WORK_IN_PARALLEL: u16 = 5;

/// Version 6: a group says what priorities are worth. Before that settings that did were foreign.
pub(super) const GROUPS_HAVE_BOOSTS: u16 = 6;

/// Version 7: what the group of the webhook gives up is a letter with a reason of its own. Before that it was one as of any
/// group.
pub(super) const WEBHOOKS: u16 = 7;

/// Version 7: custom kinds have schemas, which are in the log. Before that a record with such a key was foreign.
pub(super) const KINDS_HAVE_SCHEMAS: u16 = 7;

/// Version 4: an event that another program's producer wrote without Weft's headers is held to what a client is held to. Before
/// that a record without them was foreign.
pub(super) const PLAIN_EVENTS: u16 = 4;
