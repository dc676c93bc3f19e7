"""The stage `rms_norm`: root mean square normalisation, with the residual stream."""
