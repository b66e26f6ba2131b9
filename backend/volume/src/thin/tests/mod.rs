//! Thin's tests: single cases, and everything together beside a naive model.

mod cases;
mod damage;
mod model;
mod naive;
mod readers;
mod scale;
mod tools;
