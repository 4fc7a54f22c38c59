//! Pure folds of a thread's events into what others speak.

pub mod agui;
