"""Errors as clients of OpenAI read them."""


class ApiError(Exception):
    """What a client is told.

    Args:
        status: HTTP status.
        message: The rule that was broken, and the value.
        param: Name of the field, where one is to blame.
        code: A word that programs read.
        kind: OpenAI's `type` of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind

    def body(self) -> dict:
        """Return the error as JSON, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that breaks a rule."""
    return ApiError(400, message, param, code)
