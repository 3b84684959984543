"""The closed form, as the library has it: searched on a dev side, fitted on the train side."""
