//! On a machine without a driver, opening a GPU is an error that says so.

use transom_cuda::{Device, Error, count};

#[test]
fn without_a_driver_everything_says_so_and_nothing_panics() {
    // The outcome depends on the machine; both are checked.
    match count() {
        Ok(n) => assert!(n > 0),
        Err(error) => {
            assert!(
                matches!(error, Error::NoDriver | Error::NoGpu | Error::DriverTooOld { .. }),
                "{error}"
            );
            assert_eq!(Device::open(0).unwrap_err(), error);
        }
    }
}
